package lab

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

const (
	// cacheDir keeps what libvirtd has learnt about the machine's QEMU from
	// one lab to the next. It is the one thing that stays after Down, and
	// may be deleted at any time.
	cacheDir = "/var/cache/belay-lab"

	capsDir = "/var/cache/libvirt/qemu/capabilities"
)

// loadCapabilities gives the host what earlier hosts have learnt. A libvirtd
// with an empty cache asks QEMU before it starts its first guest, and takes four
// seconds for each emulator. What it finds there it trusts only if QEMU, libvirt,
// the kernel and KVM are still the same (libvirt, virQEMUCapsIsValid).
func (h *Host) loadCapabilities() error {
	return copyChanged(h.lab.capsCache(), h.Path(capsDir))
}

// capsCache is the cache for the lab's QEMU: libvirt names its files by QEMU's
// path, which is always the same.
func (l *Lab) capsCache() string {
	if l.qemu == "" {
		return cacheDir
	}
	sum := sha256.Sum256([]byte(l.qemu))
	return filepath.Join(cacheDir, hex.EncodeToString(sum[:8]))
}

// saveCapabilities keeps what the lab's hosts have learnt.
func (l *Lab) saveCapabilities() error {
	dirs, err := filepath.Glob(filepath.Join(l.Dir, "*", capsDir))
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		if err := copyChanged(dir, l.capsCache()); err != nil {
			return err
		}
	}
	return nil
}

// copyChanged copies the files that the target does not have alike, each in one
// step: other labs read and write the same cache.
func copyChanged(from, to string) error {
	files, err := filepath.Glob(filepath.Join(from, "*.xml"))
	if err != nil || len(files) == 0 {
		return err
	}
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue // somebody has emptied the cache
		}
		if err != nil {
			return err
		}
		target := filepath.Join(to, filepath.Base(file))
		if there, err := os.ReadFile(target); err == nil && bytes.Equal(there, b) {
			continue
		}
		if err := writeAtomic(target, b); err != nil {
			return err
		}
	}
	return nil
}

func writeAtomic(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // in vain once renamed
	_, err = f.Write(b)
	if err := errors.Join(err, f.Chmod(0o600), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
