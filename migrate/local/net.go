package local

import (
	"bufio"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"belay/migrate"
)

// link looks at a network link.
//
// Source: /sys/class/net/NAME: flags (IFF_UP), and bridge, which bridges have.
func (h *Host) link(name string) (l migrate.Link, ok bool) {
	const up = 1 // IFF_UP
	dir := h.at("/sys/class/net/" + name)
	flags, err := strconv.ParseUint(word(dir, "flags"), 0, 32)
	if err != nil {
		return l, false
	}
	info, err := os.Stat(filepath.Join(dir, "bridge"))
	return migrate.Link{Up: flags&up != 0, Bridge: err == nil && info.IsDir()}, true
}

// socket looks at the path of a Unix socket.
func (h *Host) socket(path string) migrate.Socket {
	dir, err := os.Stat(filepath.Dir(h.at(path)))
	info, none := os.Stat(h.at(path))
	return migrate.Socket{Folder: err == nil && dir.IsDir(), There: none == nil && info.Mode()&fs.ModeSocket != 0}
}

// boundSockets are the paths on which somebody listens.
//
// Source: /proc/net/unix, where a listening socket has the flag __SO_ACCEPTCON.
func (h *Host) boundSockets() map[string]bool {
	const accepts = 1 << 16
	bound := make(map[string]bool)
	h.lines("/proc/net/unix", func(line string) {
		f := strings.Fields(line)
		if len(f) < 8 {
			return
		}
		if flags, err := strconv.ParseUint(f[3], 16, 64); err == nil && flags&accepts != 0 {
			_, path, _ := strings.Cut(line, f[6]+" ") // the inode; a path may have spaces
			bound[path] = true
		}
	})
	return bound
}

// HugePageBytes is the size of this host's huge pages where none is given, 0 if
// that is not known.
//
// Source: /proc/meminfo, Hugepagesize.
func (h *Host) HugePageBytes() (bytes uint64) {
	h.lines("/proc/meminfo", func(line string) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "Hugepagesize:" && f[2] == "kB" {
			kib, _ := strconv.ParseUint(f[1], 10, 54) // what cannot be read is not known
			bytes = kib << 10
		}
	})
	return bytes
}

// lines calls f with each line of a file of procfs, and with none of one that is
// not there.
func (h *Host) lines(path string, f func(string)) {
	file, err := os.Open(h.at(path))
	if err != nil {
		return
	}
	defer file.Close()
	for s := bufio.NewScanner(file); s.Scan(); {
		f(s.Text())
	}
}
