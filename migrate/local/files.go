package local

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/migrate"
)

// file is what was found of one, and the folder that it really is in.
type file struct {
	migrate.File
	dir string
}

// files looks at files, all at once: one whose storage hangs keeps nobody else.
func (h *Host) files(ctx context.Context, needs []maint.FileNeed) map[string]file {
	found := make(map[string]file, len(needs))
	var mu sync.Mutex
	var looks sync.WaitGroup
	for _, n := range needs {
		looks.Go(func() {
			f, ok := look(ctx, h, func() file { return h.file(n.Path, n.Mark) })
			f.Hangs = !ok
			mu.Lock()
			defer mu.Unlock()
			f.Marked = f.Marked || found[n.Path].Marked // two needs can be of one path
			found[n.Path] = f
		})
	}
	looks.Wait()
	return found
}

// file looks at one file, and beside it for the mark, "" for none. It may wait for
// ever.
func (h *Host) file(path, mark string) file {
	real, err := filepath.EvalSymlinks(h.at(path))
	if err != nil {
		return missing(err)
	}
	info, err := os.Lstat(real)
	if err != nil {
		return missing(err)
	}
	f := file{dir: filepath.Dir(real)}
	f.Known, f.Kind, f.Bytes = true, kind(info.Mode()), uint64(info.Size())
	st := info.Sys().(*syscall.Stat_t)
	f.Inode = st.Ino
	switch f.Kind {
	case maint.FileBlock:
		f.Bytes, f.Device = h.block(st.Rdev)
	case maint.FileDir:
		f.Bytes = 0
	}
	if mark != "" {
		at, err := os.Lstat(filepath.Join(f.dir, mark))
		f.Marked = err == nil && at.Mode().IsRegular() && at.Size() == 0
	}
	return f
}

// missing is what is known of a file that cannot be looked at. Nothing is, unless
// it is not there: libvirt may see what belayd may not.
func missing(err error) (f file) {
	f.Known = errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR)
	return f
}

func kind(m fs.FileMode) maint.FileKind {
	switch {
	case m.IsRegular():
		return maint.FileRegular
	case m.IsDir():
		return maint.FileDir
	case m&fs.ModeSocket != 0:
		return maint.FileSocket
	case m&fs.ModeDevice != 0 && m&fs.ModeCharDevice == 0:
		return maint.FileBlock
	}
	return maint.FileOther
}

// block gives a block device's size, bytes, and its identity on whatever host, ""
// for one that has none.
//
// Sources: /sys/dev/block/MAJOR:MINOR/size (sectors of 512 bytes), dm/uuid of a
// device-mapper device (an LVM volume's UUIDs, a multipath device's WWID), wwid of
// an NVMe namespace, device/wwid of a SCSI disk.
func (h *Host) block(rdev uint64) (bytes uint64, identity string) {
	dir := h.at(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(rdev), unix.Minor(rdev)))
	sectors, _ := strconv.ParseUint(word(dir, "size"), 10, 55) // none: not known
	for _, file := range []string{"dm/uuid", "wwid", "device/wwid"} {
		if id := word(dir, file); id != "" {
			return sectors << 9, id
		}
	}
	return sectors << 9, ""
}

// word reads a file of sysfs that has one, "" where there is none.
func word(dir, file string) string {
	b, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
