package lab

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// AddDisk makes an empty raw disk of the given size in bytes and returns the
// block device by which all hosts see it, as they would a LUN of a storage
// network. The name is a file's, in Shared.
//
// libvirt migrates a guest with a disk only if it believes that both hosts see
// the same one. It believes that of a block device with cache='none', never of a
// file on a local file system, though in a lab that would be true: such a guest
// moves only with the flag for unsafe migrations, or by copying its disk
// (libvirt, qemuMigrationSrcIsSafe).
//
// The device is a loop device of the machine; [Lab.Down] detaches it.
func (l *Lab) AddDisk(ctx context.Context, name string, size uint64) (device string, err error) {
	fail := func(err error) (string, error) { return "", fmt.Errorf("cannot add disk %s: %w", name, err) }
	if name == "" || filepath.Base(name) != name {
		return fail(fmt.Errorf("its name is not a file's"))
	}
	// With the lock passed on, no cleanup runs before losetup has ended.
	held, err := lock(ctx, l.Name)
	if err != nil {
		return fail(err)
	}
	defer unlock(held, l.Name)

	path := filepath.Join(l.Shared, name)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fail(err)
	}
	if err := f.Truncate(int64(size)); err != nil {
		f.Close()
		return fail(err)
	}
	if err := f.Close(); err != nil {
		return fail(err)
	}
	cmd := tool(ctx, "losetup", "--find", "--show", "--", path)
	cmd.ExtraFiles = []*os.File{held}
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		return fail(withText(err, []byte(said.String())))
	}
	return strings.TrimSpace(string(out)), nil
}

// detachDisks detaches the loop devices whose files are the lab's.
func (l *Lab) detachDisks() error {
	backing, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return err
	}
	for _, path := range backing {
		file, err := os.ReadFile(path)
		if err != nil || !strings.HasPrefix(string(file), l.Dir+"/") {
			continue // detached since, or not ours
		}
		device := filepath.Join("/dev", filepath.Base(filepath.Dir(filepath.Dir(path))))
		f, err := os.Open(device)
		if err != nil {
			return err
		}
		err = unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0)
		f.Close()
		if err != nil {
			return fmt.Errorf("cannot detach %s: %w", device, err)
		}
	}
	return nil
}
