package probe

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Disk is the disk ruler. It owns the whole raw device: no file system, so
// that a bad block is the fault of the path under test and of nothing else.
type Disk struct {
	path string

	mu  sync.Mutex // one pass at a time
	buf []byte     // page-aligned, as O_DIRECT wants it
}

// diskChunk is the length of one transfer.
const diskChunk = mib

// NewDisk names the device, for instance /dev/vda. It need not be there until
// it is used.
func NewDisk(path string) *Disk { return &Disk{path: path} }

// Present reports whether there is such a device.
func (d *Disk) Present() bool {
	_, err := os.Stat(d.path)
	return err == nil
}

// Write fills the first c.SizeMiB MiB with the pattern of c.Seed and flushes
// it to the device.
func (d *Disk) Write(c DiskSettings) (DiskReport, error) {
	return d.pass(c, os.O_RDWR, "write", func(f *os.File, block uint64, r *DiskReport) error {
		for b := range uint64(diskChunk / pageSize) {
			put(d.buf[b*pageSize:][:pageSize], c.Seed, block+b, &r.Checksum)
		}
		_, err := f.Write(d.buf)
		return err
	})
}

// Verify reads the pattern back past the page cache and compares every word.
func (d *Disk) Verify(c DiskSettings) (DiskReport, error) {
	return d.pass(c, os.O_RDONLY, "verify", func(f *os.File, block uint64, r *DiskReport) error {
		if _, err := io.ReadFull(f, d.buf); err != nil {
			return err
		}
		for b := range uint64(diskChunk / pageSize) {
			if !match(d.buf[b*pageSize:][:pageSize], c.Seed, block+b, &r.Checksum) {
				r.BadBlocks++
			}
		}
		return nil
	})
}

// pass runs one chunk after another through do.
func (d *Disk) pass(c DiskSettings, flag int, what string, do func(*os.File, uint64, *DiskReport) error) (r DiskReport, err error) {
	if c.SizeMiB <= 0 {
		return r, fmt.Errorf("disk %s: size %d MiB", what, c.SizeMiB)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.buf == nil {
		if d.buf, err = unix.Mmap(-1, 0, diskChunk, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS); err != nil {
			return r, fmt.Errorf("disk %s: map buffer: %w", what, err)
		}
	}
	start := monotonic()
	f, err := os.OpenFile(d.path, flag|unix.O_DIRECT, 0)
	if err != nil {
		return r, fmt.Errorf("disk %s: %w", what, err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	for n := range uint64(c.SizeMiB) {
		if err := do(f, n*diskChunk/pageSize, &r); err != nil {
			return r, fmt.Errorf("disk %s at %d MiB: %w", what, n, err)
		}
		r.Bytes += diskChunk
	}
	if flag != os.O_RDONLY {
		if err := f.Sync(); err != nil {
			return r, fmt.Errorf("disk %s: flush: %w", what, err)
		}
	}
	r.Took = monotonic() - start
	return r, nil
}

// put writes the pattern of one block, word by word as in memory.
func put(b []byte, seed, block uint64, sum *uint64) {
	w := diskWord(seed, block)
	for i := 0; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], w)
		*sum = (bits.RotateLeft64(*sum, 5) ^ w) * golden
		w += golden
	}
}

// match compares one block with its pattern.
func match(b []byte, seed, block uint64, sum *uint64) bool {
	want, ok := diskWord(seed, block), true
	for i := 0; i < len(b); i += 8 {
		w := binary.LittleEndian.Uint64(b[i:])
		*sum = (bits.RotateLeft64(*sum, 5) ^ w) * golden
		ok = ok && w == want
		want += golden
	}
	return ok
}

func diskWord(seed, block uint64) uint64 { return mix(seed + block*golden) }
