// Package linux is what rungs A and B need of the kernel to keep notes, in memory or on
// disk.
package linux

import (
	"errors"
	"fmt"
	"io"
	"os"

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
