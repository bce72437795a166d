#!/bin/sh
# provision.sh FOLDER NAME ADDRESS [PEER ADDRESS]...: makes a virtualisation host with Belay of
# a machine with Debian 12, libvirt and QEMU, as docs/operator-guide.md has it. Run as root.
# FOLDER has belay_*.deb, ca.pem, NAME.pem, NAME-key.pem and, if there are any, *.pub of those
# who sign livepatches. ADDRESS is the host's on the LAN (10.77.0.0/16), which is by the NIC
# that has not the default route, under a bridge for guests, br0.
set -eu
folder=$1 name=$2 address=$3
shift 3

echo "$name" >/etc/hostname
hostname "$name"
{
	echo "127.0.0.1 localhost"
	echo "$address $name"
	i=0
	for word in "$@"; do
		i=$((i + 1))
		if [ $((i % 2)) = 1 ]; then peer=$word; else echo "$word $peer"; fi
	done
} >/etc/hosts

# The network.
outward=$(ip -4 route show default | sed -n 's/.* dev \([^ ]*\).*/\1/p' | head -n 1)
lan=
for nic in /sys/class/net/*/device; do
	nic=$(basename "${nic%/device}")
	[ "$nic" = "$outward" ] || lan=$nic
done
[ -n "$lan" ] || { echo "provision: no NIC beside $outward for the LAN" >&2; exit 1; }
cd /etc/systemd/network
printf '%s\n' '[NetDev]' Name=br0 Kind=bridge '[Bridge]' STP=no ForwardDelaySec=0 >10-br0.netdev
printf '%s\n' '[Match]' "Name=$lan" '[Network]' Bridge=br0 LinkLocalAddressing=no >10-lan.network
printf '%s\n' '[Match]' Name=br0 '[Network]' "Address=$address/16" LinkLocalAddressing=no ConfigureWithoutCarrier=yes >10-br0.network
cd /
networkctl reload
until ip -4 address show dev br0 2>/dev/null | grep -qF " $address/16 "; do sleep .2; done

# Memory that outlives the kernel, where the kernel's command line reserves some (memmap=).
if [ -b /dev/pmem0 ]; then
	blkid /dev/pmem0 >/dev/null || mkfs.ext4 -q /dev/pmem0
	mkdir -p -m 700 /var/lib/belay /var/lib/belay/memory
	echo '/dev/pmem0 /var/lib/belay/memory ext4 dax,nofail,x-systemd.makefs,x-systemd.device-timeout=90s 0 0' >>/etc/fstab
	systemctl daemon-reload
	systemctl start var-lib-belay-memory.mount
fi

# Belay.
export DEBIAN_FRONTEND=noninteractive
apt-get install -y -qq "$folder"/belay_*.deb >/dev/null
for key in "$folder"/*.pub; do
	[ ! -e "$key" ] || install -m 644 "$key" /etc/belay/keys/
done

# Certificates: belayd's, libvirt's as server and client, QEMU's.
put() { # MODE FROM TO
	install -D -m "$1" "$folder/$2" "$3"
}
put 644 ca.pem /etc/belay/pki/ca.pem
put 644 "$name.pem" /etc/belay/pki/host.pem
put 600 "$name-key.pem" /etc/belay/pki/host-key.pem
install -d -m 755 /etc/pki /etc/pki/CA /etc/pki/libvirt /etc/pki/qemu
install -d -m 700 /etc/pki/libvirt/private
put 644 ca.pem /etc/pki/CA/cacert.pem
put 644 ca.pem /etc/pki/qemu/ca-cert.pem
for role in server client; do
	put 644 "$name.pem" /etc/pki/libvirt/${role}cert.pem
	put 600 "$name-key.pem" /etc/pki/libvirt/private/${role}key.pem
	put 644 "$name.pem" /etc/pki/qemu/$role-cert.pem
	put 640 "$name-key.pem" /etc/pki/qemu/$role-key.pem
	chgrp libvirt-qemu /etc/pki/qemu/$role-key.pem
done
echo 'tls_allowed_dn_list = ["CN=host-*"]' >>/etc/libvirt/libvirtd.conf

# libvirt listens, and knows Belay's hook.
systemctl stop libvirtd.service libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket
systemctl enable --quiet --now libvirtd-tls.socket
systemctl start libvirtd.service

# belayd knows its peers.
{
	printf 'host = "%s"\n[api]\nlisten = "%s:7443"\n' "$name" "$address"
	printf '[tls]\nca = "/etc/belay/pki/ca.pem"\ncert = "/etc/belay/pki/host.pem"\nkey = "/etc/belay/pki/host-key.pem"\n'
	while [ $# -gt 0 ]; do
		printf '[peers.%s]\naddress = "%s:7443"\nlibvirt_uri = "qemu+tls://%s/system"\n' "$1" "$2" "$1"
		shift 2
	done
} >/etc/belay/belayd.d/host.toml
belayd -check
before=$(systemctl show --property=MainPID --value belayd.service)
systemctl reload belayd.service
until [ "$(systemctl show --property=MainPID --value belayd.service)" != "$before" ] && belay status >/dev/null 2>&1; do sleep .5; done
