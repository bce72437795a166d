#!/bin/sh
# Run once by busybox init (sysinit); then inittab starts agent and probe.
# A step that fails says so on the console and the next one is tried: a guest
# without network can still tell what is wrong with it.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin

try() { "$@" || echo "belay-init: FAILED: $*"; }

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run

for m in $(cat /modules.list); do try insmod "/modules/$m"; done

ip= gw= hostname=guest
for word in $(cat /proc/cmdline); do
	case $word in
	belay.ip=*) ip=${word#*=} ;;
	belay.gw=*) gw=${word#*=} ;;
	belay.hostname=*) hostname=${word#*=} ;;
	belay.no_hwclock) try busybox rm /sbin/hwclock ;;
	esac
done
try hostname "$hostname"
try ip link set lo up
if [ -n "$ip" ] && [ -e /sys/class/net/eth0 ]; then
	try ip addr add "$ip" dev eth0
	try ip link set eth0 up
	[ -z "$gw" ] || try ip route add default via "$gw"
fi

# udev would make these links.
mkdir -p /dev/virtio-ports /run/qemu
for p in /sys/class/virtio-ports/*; do
	[ -s "$p/name" ] && try ln -s "../${p##*/}" "/dev/virtio-ports/$(cat "$p/name")"
done

echo "belay-init: up"
