#!/bin/sh
# image.sh FOLDER: makes in FOLDER what a host boots from: root.img (ext4, no partitions),
# and of each kernel RELEASE vmlinuz-RELEASE and initrd.img-RELEASE; "kernels" has the
# releases, the one to boot first; id is the key by which root is let in. Everything comes from the Debian mirror that apt uses on
# this machine. It needs root, mmdebstrap and mke2fs.
set -eu
out=$1

sources=$(apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' 'Identifier: Packages' 'Origin: Debian' |
	grep -E ' bookworm(-updates|-security)? main$' | sort -u)
[ -n "$sources" ] || { echo "image: apt has no source of Debian bookworm" >&2; exit 1; }
# The two newest: one to boot, one to change to.
kernels=$(apt-cache search --names-only '^linux-image-6\.1\.0-[0-9]+-cloud-amd64$' | cut -d' ' -f1 | sort -rV | head -n 2)
[ "$(echo "$kernels" | wc -l)" = 2 ] || { echo "image: apt knows no two kernels linux-image-6.1.0-*-cloud-amd64: apt-get update" >&2; exit 1; }

packages="$(echo $kernels) initramfs-tools zstd kmod udev systemd-sysv dbus libpam-systemd
libvirt-daemon-system libvirt-clients apparmor qemu-system-x86 qemu-utils
openssh-server kexec-tools chrony nftables iproute2 procps sudo e2fsprogs util-linux-extra"

ssh-keygen -q -t ed25519 -N '' -C belay-lab -f "$out/id"
tree=$(mktemp -d "$out/tree.XXXXXX")
customize=$(mktemp "$out/customize.XXXXXX")
chmod 755 "$customize"
cat >"$customize" <<'END'
#!/bin/sh
# Within mmdebstrap, with the new system's folder. What makes a host a host is
# provision.sh's; this is what any machine of ours has.
set -eu
root=$1
in_root() { chroot "$root" "$@"; }

# What a host needs until its root is mounted, and for reserved memory: a small initrd is
# unpacked sooner.
printf '%s\n' MODULES=list COMPRESS=zstd COMPRESSLEVEL=1 RESUME=none FSTYPE=ext4 >"$root/etc/initramfs-tools/conf.d/belay"
printf '%s\n' virtio_pci virtio_blk virtio_net ext4 nd_e820 nd_pmem dax >>"$root/etc/initramfs-tools/modules"
in_root update-initramfs -u -k all

echo '/dev/vda / ext4 defaults,noatime 0 1' >"$root/etc/fstab"
# After the network files of Vagrant and of provision.sh, which know better.
printf '%s\n' '[Match]' 'Name=en* eth*' '[Network]' DHCP=ipv4 LinkLocalAddressing=no '[DHCPv4]' ClientIdentifier=mac UseHostname=no >"$root/etc/systemd/network/99-dhcp.network"
printf '%s\n' 'PermitRootLogin prohibit-password' 'PasswordAuthentication no' 'UseDNS no' 'PerSourceMaxStartups none' 'MaxStartups 100' >"$root/etc/ssh/sshd_config.d/belay.conf"
mkdir -p "$root/etc/systemd/journald.conf.d" "$root/var/log/journal"
printf '%s\n' '[Journal]' Storage=persistent RateLimitIntervalSec=0 SystemMaxUse=64M >"$root/etc/systemd/journald.conf.d/belay.conf"
in_root systemctl --quiet enable systemd-networkd.service ssh.service
# libvirt-guests shuts guests down at a reboot; the rest only takes time.
in_root systemctl --quiet mask libvirt-guests.service systemd-networkd-wait-online.service \
	apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer \
	e2scrub_reap.service getty@tty1.service serial-getty@ttyS0.service kexec-load.service kexec.service
echo 'LOAD_KEXEC=false' >"$root/etc/default/kexec"

# Vagrant's user, with the key that everybody knows until the box is up.
in_root useradd --create-home --shell /bin/bash vagrant
echo 'vagrant ALL=(ALL) NOPASSWD: ALL' >"$root/etc/sudoers.d/vagrant"
mkdir -p -m 700 "$root/root/.ssh"
cp "${0%/*}/id.pub" "$root/root/.ssh/authorized_keys"
rm -f "$root"/var/cache/apt/*.bin "$root"/var/lib/apt/lists/*_*
: >"$root/etc/machine-id"
END

echo "$sources" >"$out/sources.list"
mmdebstrap --quiet --variant=minbase --format=directory --components=main \
	--include="$(echo $packages | tr ' ' ,)" \
	--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
	--dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
	--aptopt='Apt::Install-Recommends "false"' \
	--customize-hook="$customize" bookworm "$tree" "$out/sources.list"

for package in $kernels; do
	release=${package#linux-image-}
	echo "$release"
	cp "$tree/boot/vmlinuz-$release" "$tree/boot/initrd.img-$release" "$out/"
done >"$out/kernels"
chmod 644 "$out"/vmlinuz-* "$out"/initrd.img-*
mke2fs -q -t ext4 -d "$tree" -L root -E lazy_itable_init=1,lazy_journal_init=1,nodiscard "$out/root.img" 6G
cp "$tree/etc/ssh/ssh_host_ed25519_key.pub" "$out/host.pub"
rm -rf "$tree" "$customize" "$out/sources.list" "$out/id.pub"
