// Package linux is what the parts of rung B that keep notes in memory need of the
// kernel.
package linux

import (
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
