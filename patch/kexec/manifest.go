package kexec

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/patch/internal/linux"
)

// manifest says what is kept, and of whom. It is in the reserved memory, beside what it is about.
type manifest struct {
	Op   maint.OpID        `json:"op"`
	Boot string            `json:"boot"` // in which it was saved
	Old  maint.KernelImage `json:"old"`
	New  maint.KernelImage `json:"new"`
	// Planned are all that are to be saved, and Guests those that are.
	Planned []member `json:"planned"`
	Guests  []entry  `json:"guests"`
}

// entry is one guest that is saved, completely.
type entry struct {
	member
	File   string        `json:"file"` // its name in the folder
	Size   int64         `json:"size"`
	Sum    string        `json:"sum"` // see sum
	Begun  time.Time     `json:"begun"`
	Took   time.Duration `json:"took_ns"`
	Memory string        `json:"memory"` // how it is kept: "saved"
}

// kept by libvirt's save. Another way, memory in place, would be another word here.
const bySave = "saved"

func (e entry) file(dir string) string { return filepath.Join(dir, e.File) }

const manifestName = "manifest.json"

// sealed is a manifest with its checksum: what a power cut leaves of memory is not read as one.
type sealed struct {
	SHA256   string          `json:"sha256"`
	Manifest json.RawMessage `json:"manifest"`
}

func writeManifest(dir string, m manifest) error {
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(text)
	b, err := json.Marshal(sealed{hex.EncodeToString(sum[:]), text})
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, manifestName), b)
}

// maxManifest bounds it, bytes.
const maxManifest = 16 << 20

// readManifest gives an error that is fs.ErrNotExist where there is none.
func readManifest(dir string) (m manifest, err error) {
	f, err := os.Open(filepath.Join(dir, manifestName))
	if err != nil {
		return m, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxManifest))
	if err != nil {
		return m, err
	}
	var s sealed
	if err := json.Unmarshal(b, &s); err != nil {
		return m, fmt.Errorf("%s is damaged: %w", f.Name(), err)
	}
	if sum := sha256.Sum256(s.Manifest); hex.EncodeToString(sum[:]) != s.SHA256 {
		return m, fmt.Errorf("%s is damaged: its checksum is another", f.Name())
	}
	if err := json.Unmarshal(s.Manifest, &m); err != nil {
		return m, fmt.Errorf("%s is damaged: %w", f.Name(), err)
	}
	for _, e := range m.Guests {
		if e.File != filepath.Base(e.File) {
			return m, fmt.Errorf("%s names a file elsewhere, %s", f.Name(), e.File)
		}
	}
	return m, nil
}

// settled reports whether nothing that is kept is needed any more.
func (m manifest) settled(dir string) bool {
	for _, e := range m.Guests {
		if mark, err := readMark(dir, e.UUID); err != nil || mark.Stage != stageDone {
			return false
		}
	}
	return true
}

// writeFile replaces a file, and has that on disk.
func writeFile(name string, b []byte) error {
	return cmp.Or(linux.WriteFile(name, b), linux.Sync(filepath.Dir(name)))
}

// piece is what is summed at once, bytes.
const piece = 16 << 20

// sum is the SHA-256 of the SHA-256 of each piece of a file: all CPUs share the work.
func sum(ctx context.Context, name string) (text string, size int64, err error) {
	f, err := os.Open(name)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", 0, err
	}
	size = info.Size()
	sums := make([]byte, (size+piece-1)/piece*sha256.Size)
	all, ctx := errgroup.WithContext(ctx)
	all.SetLimit(runtime.GOMAXPROCS(0))
	for i := range int64(len(sums) / sha256.Size) {
		all.Go(func() error {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			h := sha256.New()
			if _, err := io.Copy(h, io.NewSectionReader(f, i*piece, piece)); err != nil {
				return err
			}
			copy(sums[i*sha256.Size:], h.Sum(nil))
			return nil
		})
	}
	if err := all.Wait(); err != nil {
		return "", 0, err
	}
	total := sha256.Sum256(sums)
	return hex.EncodeToString(total[:]), size, nil
}

// savedMagic is how a file begins in which libvirt has saved a guest completely; until it
// has, the file begins otherwise (libvirt, qemu_saveimage.h).
const savedMagic = "LibvirtQemudSave"

func complete(name string) bool {
	f, err := os.Open(name)
	if err != nil {
		return false
	}
	defer f.Close()
	head := make([]byte, len(savedMagic))
	_, err = io.ReadFull(f, head)
	return err == nil && bytes.Equal(head, []byte(savedMagic))
}

// lock keeps two from restoring at once: belayd, and "belayd -restore".
func (j *Job) lock(ctx context.Context) (unlock func(), err error) {
	dir := j.dir()
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for giveUp := time.Now().Add(j.Pace.Healed); ; {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if time.Now().After(giveUp) || !wait(ctx, j.Pace.Poll) {
			f.Close()
			return nil, maint.Problemf(maint.CodeBusy, "folder "+j.Dir, "wait for it", "another process saves or restores guests there: %v", err)
		}
	}
}

// The stages of a mark; see the package's comment.
const (
	stageRestoring = "restoring"
	stageReleased  = "released"
	stageDone      = "done"
)

// mark is how far a guest's restore has got.
type mark struct {
	Stage string           `json:"stage"` // "": it has not been begun
	Boot  string           `json:"boot"`  // the host's, then
	Guest maint.KexecGuest `json:"guest,omitzero"`
}

func markFile(dir, uuid string) string { return filepath.Join(dir, filepath.Base(uuid)+".mark") }

func readMark(dir, uuid string) (m mark, err error) {
	b, err := os.ReadFile(markFile(dir, uuid))
	if errors.Is(err, os.ErrNotExist) {
		return m, nil
	}
	if err != nil {
		return m, err
	}
	return m, json.Unmarshal(b, &m)
}

func writeMark(dir, uuid string, m mark) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return writeFile(markFile(dir, uuid), b)
}
