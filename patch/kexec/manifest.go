package kexec

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/cespare/xxhash/v2"
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
	// Planned are all that are to be saved, Guests those that are, and Left the UUIDs of those
	// that their owners had ended before.
	Planned []member `json:"planned"`
	Guests  []entry  `json:"guests"`
	Left    []string `json:"left,omitempty"`
	// Damaged is why it is not the one that was written then, "" if it is; see rebuilt.
	Damaged string `json:"damaged,omitempty"`
}

// entry is one guest that is saved, completely.
type entry struct {
	member
	File   string        `json:"file"` // its name in the folder
	Size   int64         `json:"size"`
	Sum    string        `json:"sum"` // see sum
	Begun  time.Time     `json:"begun"`
	Took   time.Duration `json:"took_ns"`
	Memory string        `json:"memory"` // how it is kept: "saved", "in place"
	// InPlace is how much of its memory is kept in place, bytes.
	InPlace uint64 `json:"in_place,omitempty"`
	// Written is when each disk was written to last, as far as that shows.
	Written map[string]time.Time `json:"written,omitempty"`
}

// The ways in which a guest is kept: copied, by libvirt's save; only the state of its devices, its
// memory staying where it is.
const (
	bySave  = "saved"
	inPlace = "in place"
)

func (e entry) file(dir string) string { return filepath.Join(dir, e.File) }

// The files of a guest are called by its UUID: what is saved of it, its mark, and what was
// saved of it and is out of date, or damaged.
const (
	saveExt = ".save"
	markExt = ".mark"
	lostExt = ".lost"
)

const manifestName = "manifest.json"

// sealed is something with its checksum: what a power cut leaves of memory is not read as it.
type sealed struct {
	SHA256 string          `json:"sha256"`
	Text   json.RawMessage `json:"text"`
}

// writeSealed replaces a file, and has that on disk.
func writeSealed(name string, v any) error {
	b, err := seal(v)
	if err != nil {
		return err
	}
	return cmp.Or(linux.WriteFile(name, b), linux.Sync(filepath.Dir(name)))
}

func seal(v any) ([]byte, error) {
	text, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(text)
	return json.Marshal(sealed{hex.EncodeToString(sum[:]), text})
}

// maxSealed bounds such a file, bytes.
const maxSealed = 16 << 20

// readSealed gives an error that is fs.ErrNotExist where there is no such file.
func readSealed(name string, v any) error {
	b, err := linux.ReadFile(name, maxSealed)
	if err != nil {
		return err
	}
	return unseal(name, b, v)
}

// errDamaged: a file is not what was written.
var errDamaged = errors.New("is damaged")

func unseal(name string, b []byte, v any) error {
	var s sealed
	if err := json.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("%s %w: %w", name, errDamaged, err)
	}
	if sum := sha256.Sum256(s.Text); hex.EncodeToString(sum[:]) != s.SHA256 {
		return fmt.Errorf("%s %w: its checksum is another", name, errDamaged)
	}
	if err := json.Unmarshal(s.Text, v); err != nil {
		return fmt.Errorf("%s %w: %w", name, errDamaged, err)
	}
	return nil
}

func writeManifest(dir string, m manifest) error {
	return writeSealed(filepath.Join(dir, manifestName), m)
}

// readManifest gives an error that is fs.ErrNotExist where there is none.
func readManifest(dir string) (m manifest, err error) {
	name := filepath.Join(dir, manifestName)
	if err := readSealed(name, &m); err != nil {
		return manifest{}, err
	}
	for _, g := range m.Planned {
		if g.UUID == "" || g.UUID != filepath.Base(g.UUID) {
			return manifest{}, fmt.Errorf("%s names a guest %q", name, g.UUID)
		}
	}
	for _, e := range m.Guests {
		if e.UUID == "" || e.UUID != filepath.Base(e.UUID) || e.File != e.UUID+saveExt {
			return manifest{}, fmt.Errorf("%s names a file elsewhere, %q", name, e.File)
		}
	}
	return m, nil
}

// rebuilt is a manifest in the place of one that is damaged, by what is saved of guests. Of those whose
// memory is in place that tells all; of others nothing tells whether it is whole. Its Op and its Boot are
// "" where no guest is in place.
func (j *Job) rebuilt(ctx context.Context, why error) manifest {
	m := manifest{Guests: []entry{}, Damaged: why.Error()}
	files, _ := filepath.Glob(filepath.Join(j.dir(), "*"+saveExt))
	for _, name := range files {
		uuid := strings.TrimSuffix(filepath.Base(name), saveExt)
		g := member{Name: uuid, UUID: uuid}
		if now, err := j.Host.Guest(ctx, uuid); err == nil {
			g.Name = now.Name
		}
		if l, err := readLeaving(name); err == nil && l.Seat.UUID == uuid {
			g, m.Op, m.Boot = l.Guest, maint.OpID(l.Token), l.Boot
			g.Name, g.UUID, g.InPlace = l.Seat.Guest, uuid, true
		}
		m.Planned = append(m.Planned, g)
	}
	return m
}

// told reports whether what is kept of a guest says what became of it although the manifest was damaged.
func (j *Job) told(m manifest, uuid string) bool {
	in, _ := stayed(j.file(uuid, saveExt))
	done, _ := readMark(j.dir(), uuid)
	return in || done.Stage == stageDone || slices.ContainsFunc(m.Guests, func(e entry) bool { return e.UUID == uuid })
}

// settled reports whether nothing that is kept is needed any more.
func (m manifest) settled(dir string) bool { return len(m.kept(dir)) == 0 }

// kept names the guests of which something is needed yet: also those that were saved by a belayd
// that died before it could put them into Guests.
func (m manifest) kept(dir string) (names []string) {
	named := make(map[string]bool)
	for _, e := range m.Guests {
		named[e.UUID] = true
	}
	for _, g := range m.Planned {
		if mark, err := readMark(dir, g.UUID); err == nil && mark.Stage == stageDone {
			continue
		}
		complete, _, err := saved(filepath.Join(dir, g.UUID+saveExt))
		if named[g.UUID] || complete || err != nil {
			names = append(names, g.Name)
		}
	}
	return names
}

// Kept are the guests that a folder of reserved memory holds, and that are not restored yet or
// given up, and the operation that has saved them.
func (t Tree) Kept(dir string) (op maint.OpID, guests []string) {
	dir = t.at(dir)
	m, err := readManifest(dir)
	if err != nil {
		return "", nil
	}
	return m.Op, m.kept(dir)
}

// piece is what is summed at once, bytes.
const piece = 16 << 20

// sum is the SHA-256 of the XXH64 of each piece of a file: all CPUs share the work. It tells
// damage, not malice, and guests stand still for it: SHA-256 of all of it takes longer than to
// save and restore them, on processors without instructions for it.
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
	sums := make([]byte, (size+piece-1)/piece*8)
	all, ctx := errgroup.WithContext(ctx)
	all.SetLimit(runtime.GOMAXPROCS(0))
	for i := range int64(len(sums) / 8) {
		all.Go(func() error {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			h := xxhash.New()
			if _, err := io.Copy(h, io.NewSectionReader(f, i*piece, piece)); err != nil {
				return err
			}
			binary.BigEndian.PutUint64(sums[i*8:], h.Sum64())
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
// has, the file begins otherwise. After it are, in the machine's byte order, a version, the
// length of the guest's XML, and whether the guest ran, 4 bytes each (libvirt, qemu_saveimage.h).
const (
	savedMagic = "LibvirtQemudSave"
	savedRan   = len(savedMagic) + 8
)

// saved reports whether a guest is in a file, completely, and whether it ran until then: one that is
// kept in place did, and its file appears when it is whole. An error says that this cannot be told:
// it may be.
func saved(name string) (complete, ran bool, err error) {
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, false, nil
	}
	if err != nil {
		return false, false, err
	}
	defer f.Close()
	head := make([]byte, savedRan+4)
	switch _, err := io.ReadFull(f, head); {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return false, false, nil
	case err != nil:
		return false, false, err
	}
	if isInPlace(head) {
		return true, true, nil
	}
	return bytes.HasPrefix(head, []byte(savedMagic)), binary.NativeEndian.Uint32(head[savedRan:]) != 0, nil
}

// written are the times at which files were written to last. What is no file, or cannot be
// looked at, has none.
func (t Tree) written(files []string) map[string]time.Time {
	times := make(map[string]time.Time)
	for _, f := range files {
		if info, err := os.Stat(t.at(f)); err == nil && info.Mode().IsRegular() {
			times[f] = info.ModTime().Round(0)
		}
	}
	return times
}

// since names a file that was written to after it should have been; "": none. A time that went
// back is that of a file system that was not unmounted. An error: one cannot be looked at.
func (t Tree) since(times map[string]time.Time) (file string, unseen error) {
	for f, then := range times {
		info, err := os.Stat(t.at(f))
		if err != nil {
			unseen = err
		} else if info.ModTime().After(then) {
			return f, nil
		}
	}
	return "", unseen
}

// lockGrace is how long the lock may be kept by nobody: by a process that was just forked, and
// has not let go of its parent's files yet.
const lockGrace = 5 * time.Second

// lock keeps two from restoring at once: belayd, and "belayd -restore".
func (j *Job) lock(ctx context.Context) (unlock func(), err error) {
	dir := j.dir()
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for giveUp := time.Now().Add(max(j.Pace.Healed, lockGrace)); ; {
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
	stageStarted   = "started"
	stageDone      = "done"
)

// mark is how far a guest's restore has got.
type mark struct {
	Stage string           `json:"stage"` // "": it has not been begun
	Boot  string           `json:"boot"`  // the host's, then
	Guest maint.KexecGuest `json:"guest,omitzero"`
	// Failed: what was to restore it has ended, as was seen, and has not run it.
	Failed bool `json:"failed,omitempty"`
	// Settled: its autostart and its clock are as they should be.
	Settled bool `json:"settled,omitempty"`
}

// begun: the guest's restore was begun, and has not ended, as far as is written down.
func (m mark) begun() bool { return m.Stage == stageRestoring || m.Stage == stageReleased }

func markFile(dir, uuid string) string { return filepath.Join(dir, filepath.Base(uuid)+markExt) }

func readMark(dir, uuid string) (m mark, err error) {
	err = readSealed(markFile(dir, uuid), &m)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return m, err
}

func writeMark(dir, uuid string, m mark) error { return writeSealed(markFile(dir, uuid), m) }
