# Makes a cluster node out of new mount, PID and UTS namespaces, of which it is
# process 1: $1 is its name, $2 this folder. All that Corosync and Pacemaker write
# goes to file systems that end with the node, which is when standard input ends.
set -eu
mount --make-rprivate /
umount -a -l -t nsfs # copies, which would keep other tests' namespaces alive
mount -t proc proc /proc
mount -t tmpfs node /dev/shm
for dir in /run /var/lib/corosync /var/lib/pacemaker /var/log/pacemaker; do
	mount -t tmpfs -o mode=0755 node $dir
done
hostname "$1"
mkdir -p /run/lock /run/resource-agents
for dir in blackbox cib cores pengine; do
	install -d -o hacluster -g haclient -m 750 /var/lib/pacemaker/$dir
done
install -o hacluster -g haclient -m 600 "$2/cib.xml" /var/lib/pacemaker/cib/cib.xml

# The agent of resource-agents 4.12 fails on a Pacemaker of 2.1, which prints no
# transition summary when there is none; this is ClusterLabs/resource-agents#1854.
agent=/usr/lib/ocf/resource.d/heartbeat/azure-events-az
sed '/def transitionSummary/,/def /s/return False/return ""/' $agent >/run/azure-events-az
chmod 755 /run/azure-events-az
mount --bind /run/azure-events-az $agent

corosync -f -c "$2/corosync.conf" &
{
	until corosync-cfgtool -s; do
		sleep .05
	done >/dev/null 2>&1
	exec pacemakerd
} &
read -r _ || :
