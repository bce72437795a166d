// Package linux is what rungs A and B need of the kernel to keep notes, in memory or on
// disk.
package linux

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// ReadFile reads a file of at most that many bytes. What is not a file, a pipe
// say, does not hold the reader up: it is an error.
func ReadFile(name string, most int64) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return ReadAll(f, most)
}

// ReadAll is ReadFile of an open file, from its beginning.
func ReadAll(f *os.File, most int64) ([]byte, error) {
	switch info, err := f.Stat(); {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a file", f.Name())
	case info.Size() > most:
		return nil, fmt.Errorf("%s has %d bytes, more than %d", f.Name(), info.Size(), most)
	}
	return io.ReadAll(io.NewSectionReader(f, 0, most))
}

// OpenTrusted opens a file, or a folder, that nobody but root and this process's own user can
// have put there or changed. What is judged is what is opened, by the place where it is: a
// link on the way may have been changed since.
func OpenTrusted(name string) (*os.File, error) {
	if !filepath.IsAbs(name) {
		return nil, fmt.Errorf("%s is no absolute path", name)
	}
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if err := trusted(f); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func trusted(f *os.File) error {
	place, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	at := place
	for there, err := os.Lstat(at); ; there, err = os.Lstat(at) {
		switch {
		case err != nil:
			return err
		case at == place && !os.SameFile(info, there):
			return fmt.Errorf("%s was exchanged while it was opened", f.Name())
		case !rootsAlone(there, at == place):
			return fmt.Errorf("%s can be written by others than root", at)
		case at == "/":
			return nil
		}
		at = filepath.Dir(at)
	}
}

// rootsAlone judges what is opened, or a folder on the way to it. In a sticky one others can add
// files, but not move those of root's.
func rootsAlone(info os.FileInfo, opened bool) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || int(st.Uid) != 0 && int(st.Uid) != os.Geteuid() {
		return false
	}
	return info.Mode().Perm()&0o022 == 0 || !opened && info.Mode()&os.ModeSticky != 0
}

// WriteFile replaces a file, all or nothing, also when the host dies. That it has its name
// is on disk after Sync of its folder. Nobody else writes it meanwhile.
func WriteFile(name string, b []byte) error {
	f, err := os.OpenFile(name+"~", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(name+"~", name)
}

// Sync has a file, or the names in a folder, be on disk.
func Sync(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
