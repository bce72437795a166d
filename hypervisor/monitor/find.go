package monitor

import (
	"cmp"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// DefaultLibDir is where libvirt keeps what belongs to running guests.
const DefaultLibDir = "/var/lib/libvirt/qemu"

// Find gives the monitor socket of the domain with that ID (maint.Guest.ID):
// <libDir>/domain-<id>-<name>/monitor.sock, below DefaultLibDir when libDir is
// empty. libvirt counts IDs anew when the host has booted, and a folder may have
// been left behind; of several the newest is given. Ask the monitor for its
// UUID. It wraps fs.ErrNotExist when there is none.
func Find(libDir string, id int) (path string, err error) {
	libDir = cmp.Or(libDir, DefaultLibDir)
	fail := func(err error) (string, error) {
		return "", fmt.Errorf("cannot find the monitor of domain %d below %s: %w", id, libDir, err)
	}
	if id <= 0 {
		return fail(fs.ErrNotExist) // it is off
	}
	entries, err := os.ReadDir(libDir)
	if err != nil {
		return fail(err)
	}
	var made time.Time
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), fmt.Sprintf("domain-%d-", id)) {
			continue
		}
		socket := filepath.Join(libDir, e.Name(), "monitor.sock")
		info, err := os.Lstat(socket)
		if err != nil || info.Mode().Type() != fs.ModeSocket {
			continue
		}
		if path == "" || info.ModTime().After(made) {
			path, made = socket, info.ModTime()
		}
	}
	if path == "" {
		return fail(fs.ErrNotExist)
	}
	return path, nil
}
