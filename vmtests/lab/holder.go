package lab

import (
	"bufio"
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// holderScript makes a host out of new mount and UTS namespaces: $1 is its
// name, $2 its folder, $3 where its QEMU is or nothing, $4 where guests' memory
// is to be a tmpfs, the rest its private folders. /run is a tmpfs too, as on every
// machine: libvirtd syncs what it writes there each time that a guest's state
// changes, and that must not wait for a disk. It is run in the host's
// network namespace.
//
// Mounts of other network namespaces, this lab's and other labs', were copied
// into the new mount namespace and would keep those alive after their own
// lab's Down: they go first. One that is gone when its turn comes, since its lab is
// going down, is an error: then it is begun again.
//
// /sys shows the links of the network namespace it was mounted in. The machine's
// cgroups are below the old one and go with it.
const holderScript = `set -eu
umount -a -l -t nsfs || umount -a -l -t nsfs || umount -a -l -t nsfs
hostname "$1"
dir=$2
qemu=$3
memory=$4
shift 4
if [ -n "$qemu" ]; then
	for part in /usr/bin/qemu-system-x86_64 /usr/lib/x86_64-linux-gnu/qemu /usr/share/qemu /usr/share/seabios; do
		mount --bind "$qemu$part" "$part"
	done
fi
for private; do
	mount --bind "$dir$private" "$private"
done
mount -t tmpfs -o mode=0755 run /run
mkdir /run/lock /run/libvirt
mkdir -p "$memory"
mount -t tmpfs -o mode=0755 guest-memory "$memory"
umount -R -l /sys
mount -t sysfs sysfs /sys
echo ready
exec sleep infinity >/dev/null 2>&1
`

// startHolder starts the process that holds the host's mount and UTS
// namespaces, and returns once the mounts are made. The process is born in the
// host's network namespace, not moved there, so that from its first moment a
// cleanup finds it. It has a session of its own: Ctrl-C is for the owner, who
// then takes the lab down in order.
func (h *Host) startHolder(ctx context.Context) error {
	args := append([]string{"-c", holderScript, "holder", h.Name, h.Dir, h.lab.qemu, MemoryDir}, privateDirs()...)
	// The holder outlives ctx, and so do the daemons.
	cmd := tool(context.WithoutCancel(ctx), "sh", args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid: true,
		// Unshareflags and not Cloneflags: with these the mounts become
		// private before the program runs, and none of the host's
		// spread back to the machine.
		Unshareflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS,
	}
	said, err := os.OpenFile(filepath.Join(h.Dir, "holder.out"), os.O_CREATE|os.O_RDWR|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer said.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd.Stdout, cmd.Stderr = w, said
	err = inNetns(h.netns, cmd.Start)
	w.Close()
	if err != nil {
		return err
	}
	go cmd.Wait() // reaped whenever it ends; Down looks at /proc, not at this
	h.holder = cmd.Process.Pid

	stop := context.AfterFunc(ctx, func() { r.SetReadDeadline(time.Now()) })
	defer stop()
	line, _ := bufio.NewReader(r).ReadString('\n')
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if line != "ready\n" {
		text, _ := os.ReadFile(said.Name())
		return withText(errors.New("its script failed"), text)
	}
	return nil
}
