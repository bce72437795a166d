package lab

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// CollectLogs copies what the hosts' daemons and guests have logged into the
// folder, one subfolder for each host. It goes on after an error.
func (l *Lab) CollectLogs(dir string) error {
	var errs []error
	for _, h := range l.Hosts {
		errs = append(errs, copyFiles(h.Path("/var/log/libvirt"), filepath.Join(dir, h.Name)))
	}
	return errors.Join(errs...)
}

// copyFiles copies the regular files below a folder.
func copyFiles(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		target := filepath.Join(to, rel)
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return err
		}
		return os.WriteFile(target, b, 0o644)
	})
}
