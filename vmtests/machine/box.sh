#!/bin/sh
# box.sh IMAGE FOLDER: makes of the hosts' image a box for Vagrant's provider libvirt,
# FOLDER/belay-host.box, and puts the kernel and initrd with which it boots beside it. Vagrant's
# own key, which everybody knows, takes the place of the lab's.
set -eu
image=$1 out=$2
key=$(ls /usr/share/rubygems-integration/all/gems/vagrant-*/keys/vagrant.pub /opt/vagrant/embedded/gems/gems/vagrant-*/keys/vagrant.pub 2>/dev/null | head -n 1)
[ -n "$key" ] || { echo "box: there is no Vagrant with its keys/vagrant.pub" >&2; exit 1; }

work=$(mktemp -d "$out/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
cp --sparse=always "$image/root.img" "$work/root.img"
debugfs -w -f - "$work/root.img" >/dev/null 2>"$work/log" <<END
rm /root/.ssh/authorized_keys
mkdir /home/vagrant/.ssh
set_inode_field /home/vagrant/.ssh uid 1000
set_inode_field /home/vagrant/.ssh gid 1000
set_inode_field /home/vagrant/.ssh mode 040700
cd /home/vagrant/.ssh
write $key authorized_keys
set_inode_field authorized_keys uid 1000
set_inode_field authorized_keys gid 1000
set_inode_field authorized_keys mode 0100600
END
for file in /home/vagrant/.ssh/authorized_keys; do
	debugfs -R "stat $file" "$work/root.img" 2>/dev/null | grep -q 'Mode:  0600' || { cat "$work/log" >&2; echo "box: $file was not written" >&2; exit 1; }
done
qemu-img convert -q -O qcow2 "$work/root.img" "$work/box.img"
echo '{"provider": "libvirt", "format": "qcow2", "virtual_size": 6}' >"$work/metadata.json"
echo 'Vagrant.configure("2") { |config| }' >"$work/Vagrantfile"
tar -C "$work" -czf "$out/belay-host.box.new" metadata.json Vagrantfile box.img
mv "$out/belay-host.box.new" "$out/belay-host.box"
release=$(head -n 1 "$image/kernels")
cp "$image/vmlinuz-$release" "$out/vmlinuz"
cp "$image/initrd.img-$release" "$out/initrd.img"
