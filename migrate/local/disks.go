package local

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/migrate"
)

var (
	// ErrInTheWay: something is at the path where a disk is to be.
	ErrInTheWay = errors.New("something is there already")
	// ErrInUse: a process has the file open and locked, as QEMU has a guest's disks.
	ErrInUse = errors.New("a process has it open")
	// errHangs: storage has not answered in time.
	errHangs = errors.New("its storage does not answer")
)

// Places looks where disks are to be made.
func (h *Host) Places(ctx context.Context, disks []maint.DiskCopy) map[string]migrate.DiskPlace {
	all := make(map[string]migrate.DiskPlace, len(disks))
	for _, d := range disks {
		p, inTime := look(ctx, h, func() migrate.DiskPlace { return h.place(d.Path) })
		p.Hangs = !inTime
		all[d.Path] = p
	}
	return all
}

func (h *Host) place(path string) (p migrate.DiskPlace) {
	dir := h.at(filepath.Dir(path))
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) || err == nil && !info.IsDir():
		p.Known = true
		return p
	case err != nil:
		return p
	}
	p.Known, p.Folder = true, true
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		p.Known = false
		return p
	}
	p.Real = filepath.Join("/", strings.TrimPrefix(real, h.root))
	p.Denied = unix.Access(dir, unix.W_OK|unix.X_OK) != nil
	p.Storage = uint64(info.Sys().(*syscall.Stat_t).Dev)
	var s unix.Statfs_t
	if unix.Statfs(dir, &s) == nil {
		p.Free = s.Bavail * uint64(s.Bsize)
	}
	if at, err := os.Lstat(h.at(path)); err == nil {
		p.There, p.Taken = true, uint64(at.Sys().(*syscall.Stat_t).Blocks)*512
	} else if !errors.Is(err, fs.ErrNotExist) {
		p.Known = false
	}
	return p
}

// QemuImg reports whether there is the program that makes qcow2 images.
func (h *Host) QemuImg() bool {
	_, err := exec.LookPath("qemu-img")
	return err == nil
}

// PlanDisk names the file as which a disk is to be made.
func PlanDisk(d maint.DiskCopy) maint.MadeFile {
	nonce := make([]byte, 16)
	_, _ = rand.Read(nonce) // does not fail
	return maint.MadeFile{DiskCopy: d, Temp: filepath.Join(filepath.Dir(d.Path), ".belay-disk-"+hex.EncodeToString(nonce))}
}

// MakeDisk makes an empty image under its temporary name, and tells which file it is.
// Nothing is at the disk's own path yet. Where storage hangs the image may come to be later;
// until then RemoveDisk fails.
func (h *Host) MakeDisk(ctx context.Context, f maint.MadeFile) (maint.MadeFile, error) {
	type made struct {
		maint.MadeFile
		error
	}
	ctx, cancel := context.WithTimeout(ctx, h.wait)
	defer cancel()
	begin := func() { h.making.Store(f.Temp, true) }
	m, inTime := lookFrom(ctx, h, begin, func() made {
		defer h.making.Delete(f.Temp)
		if err := h.create(ctx, h.at(f.Temp), f.DiskCopy); err != nil {
			return made{f, err}
		}
		id, err := identify(h.at(f.Temp))
		f.Device, f.Inode, f.Born = id.device, id.inode, id.born
		return made{f, err}
	})
	if !inTime {
		return f, fmt.Errorf("cannot make %s: %w", f.Path, errHangs)
	}
	if m.error != nil {
		return f, fmt.Errorf("cannot make %s: %w", f.Path, m.error)
	}
	return m.MadeFile, nil
}

// create makes an image at a path where nothing is.
func create(ctx context.Context, path string, d maint.DiskCopy) error {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if d.Format == "raw" {
		return errors.Join(file.Truncate(int64(d.Bytes)), file.Close())
	}
	if err := file.Close(); err != nil {
		return err
	}
	args := []string{"create", "-q", "-f", d.Format}
	if d.Backing != "" { // which is looked at by nobody before the guest comes: -u
		args = append(args, "-u", "-b", d.Backing, "-F", d.BackingFormat)
	}
	// It ends with belayd, which would know nothing of what it makes after that: the signal
	// comes when the thread ends that has started it (prctl(2)).
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	c := exec.CommandContext(ctx, "qemu-img", append(args, path, strconv.FormatUint(d.Bytes, 10))...)
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("qemu-img: %w: %s", err, out)
	}
	return nil
}

// PlaceDisk puts a file that was made at the disk's path. Where anything is there it is
// ErrInTheWay, and left alone.
func (h *Host) PlaceDisk(ctx context.Context, f maint.MadeFile) error {
	err, inTime := look(ctx, h, func() error {
		temp, path := h.at(f.Temp), h.at(f.Path)
		err := os.Link(temp, path)
		if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EOPNOTSUPP) { // no links there
			return unix.Renameat2(unix.AT_FDCWD, temp, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE)
		}
		if err != nil {
			return err
		}
		return os.Remove(temp)
	})
	switch {
	case !inTime:
		return fmt.Errorf("cannot put a disk at %s: %w", f.Path, errHangs)
	case errors.Is(err, fs.ErrExist):
		return fmt.Errorf("cannot put a disk at %s: %w", f.Path, ErrInTheWay)
	}
	return err
}

// RemoveDisk removes a file that was made, and no other: what is at its path but is not
// that very file is left alone. One that a process has open is left as well: ErrInUse.
func (h *Host) RemoveDisk(ctx context.Context, f maint.MadeFile) error {
	if _, making := h.making.Load(f.Temp); making { // and would be there again
		return fmt.Errorf("cannot remove %s, which is being made: %w", f.Temp, errHangs)
	}
	err, inTime := look(ctx, h, func() error {
		if err := os.Remove(h.at(f.Temp)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return removeMade(h.at(f.Path), f)
	})
	if !inTime {
		err = errHangs
	}
	if err != nil {
		return fmt.Errorf("cannot remove %s: %w", f.Path, err)
	}
	return nil
}

func removeMade(path string, f maint.MadeFile) error {
	if f.Inode == 0 { // it never was at its path
		return nil
	}
	id, err := identify(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR):
		return nil
	case err != nil:
		return err
	case !id.is(f):
		return nil
	}
	open, err := locked(path)
	switch {
	case err != nil:
		return err
	case open:
		return ErrInUse
	}
	return os.Remove(path)
}

// locked reports whether a process holds a lock on any part of a file, as QEMU does of
// an image that it has open (image locking, on by default).
func locked(path string) (bool, error) {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return false, err
	}
	defer func() { _ = file.Close() }()
	lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: 0}
	if err := unix.FcntlFlock(file.Fd(), unix.F_OFD_GETLK, &lock); err != nil {
		return false, err
	}
	return lock.Type != unix.F_UNLCK, nil
}

// identity tells a file from any other. A number of an inode is given again when its file
// has gone; with when it was born it is not.
type identity struct {
	device, inode uint64
	born          int64 // nanoseconds since 1970; 0: the file system does not say
}

func (i identity) is(f maint.MadeFile) bool {
	if i.born != 0 && f.Born != 0 { // devices are numbered anew when a host boots
		return i.inode == f.Inode && i.born == f.Born
	}
	return i.inode == f.Inode && i.device == f.Device
}

func identify(path string) (identity, error) {
	var s unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &s); err != nil {
		return identity{}, &fs.PathError{Op: "statx", Path: path, Err: err}
	}
	if s.Mode&unix.S_IFMT != unix.S_IFREG {
		return identity{}, nil // no file that was made
	}
	i := identity{device: unix.Mkdev(s.Dev_major, s.Dev_minor), inode: s.Ino}
	if s.Mask&unix.STATX_BTIME != 0 {
		i.born = s.Btime.Sec*1e9 + int64(s.Btime.Nsec)
	}
	return i, nil
}

// IsMade reports whether what is at its path is the very file that was made.
func (h *Host) IsMade(ctx context.Context, f maint.MadeFile) bool {
	is, _ := look(ctx, h, func() bool {
		id, err := identify(h.at(f.Path))
		return err == nil && f.Inode != 0 && id.is(f)
	})
	return is
}
