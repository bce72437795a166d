package local

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"belay/agent/maint"
)

// Mark completes what the source tells a peer of its files: sizes, identities, and
// for those that must be the same a mark beside them. done removes the marks.
// Where none can be made (storage that belayd may not write to) the peer compares
// inode numbers.
func (h *Host) Mark(ctx context.Context, needs []maint.FileNeed) (marked []maint.FileNeed, done func()) {
	ctx, cancel := context.WithTimeout(ctx, h.wait)
	defer cancel()
	marked = slices.Clone(needs)
	found := h.files(ctx, marked)
	var dirs []string
	for i := range marked {
		n := &marked[i]
		f := found[n.Path]
		if f.Kind != n.Kind {
			continue // nothing that could be compared
		}
		n.Inode, n.Device = f.Inode, f.Device
		if n.Kind == maint.FileBlock || !n.Same { // a file that is written to may be growing
			n.Bytes = f.Bytes
		}
		if n.Kind == maint.FileRegular && n.Same {
			dirs = append(dirs, f.dir)
		}
	}
	slices.Sort(dirs)
	if dirs = slices.Compact(dirs); len(dirs) == 0 {
		return marked, func() {}
	}
	m, err := h.make(ctx, dirs)
	if err != nil {
		return marked, func() {}
	}
	for i := range marked {
		if n := &marked[i]; n.Kind == maint.FileRegular && n.Same && slices.Contains(m.made, found[n.Path].dir) {
			n.Mark = m.name
		}
	}
	return marked, func() { h.unmake(context.WithoutCancel(ctx), m) }
}

// marks are files of one name in several folders.
type marks struct {
	name string
	dirs []string // where they were to be made
	made []string // where they are
	late bool     // one may come to be yet: its storage has not answered
}

// make writes down which marks there will be, and makes them. An error says that
// there is none.
func (h *Host) make(ctx context.Context, dirs []string) (marks, error) {
	nonce := make([]byte, 16)
	_, _ = rand.Read(nonce) // does not fail
	m := marks{name: ".belay-" + hex.EncodeToString(nonce), dirs: dirs}
	if err := h.record(m); err != nil {
		return m, fmt.Errorf("cannot write down that storage is marked: %w", err)
	}
	for _, dir := range dirs {
		ok, inTime := look(ctx, h, func() bool {
			file, err := os.OpenFile(filepath.Join(dir, m.name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
			if err != nil {
				return false
			}
			return file.Close() == nil
		})
		if ok {
			m.made = append(m.made, dir)
		}
		m.late = m.late || !inTime
	}
	return m, nil
}

// record has the marks on disk before they are made.
func (h *Host) record(m marks) error {
	if err := os.MkdirAll(h.marks, 0o700); err != nil {
		return err
	}
	file, err := os.OpenFile(filepath.Join(h.marks, m.name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = file.WriteString(strings.Join(m.dirs, "\x00"))
	err = errors.Join(err, file.Sync(), file.Close())
	dir, open := os.Open(h.marks)
	if open != nil {
		return errors.Join(err, open)
	}
	return errors.Join(err, dir.Sync(), dir.Close())
}

// unmake removes marks, and then their record. It stays where one cannot be
// removed, or may come to be yet, for the next start.
func (h *Host) unmake(ctx context.Context, m marks) {
	gone := true
	for _, dir := range m.dirs {
		ok, _ := look(ctx, h, func() bool { return remove(filepath.Join(dir, m.name)) })
		gone = gone && ok
	}
	if gone && !m.late {
		_ = os.Remove(filepath.Join(h.marks, m.name)) // else it is removed by the next start
	}
}

// remove removes a mark, and nothing that is none.
func remove(path string) (gone bool) {
	info, err := os.Lstat(path)
	if err == nil && info.Mode().IsRegular() && info.Size() == 0 {
		err = os.Remove(path)
	}
	return errors.Is(err, fs.ErrNotExist) || err == nil
}

// Leftovers are the names of marks that an earlier belayd has left, perhaps. It is
// called before any are made.
func (h *Host) Leftovers() (names []string) {
	all, _ := os.ReadDir(h.marks) // there is no folder before the first mark
	for _, e := range all {
		if maint.IsMark(e.Name()) {
			names = append(names, e.Name())
		}
	}
	return names
}

// Sweep removes marks that were left. Those whose storage does not answer are left
// for the next time.
func (h *Host) Sweep(ctx context.Context, names []string) {
	for _, name := range names {
		text, err := os.ReadFile(filepath.Join(h.marks, name))
		if err != nil {
			continue
		}
		// A torn record is of marks that were never made.
		dirs := strings.Split(string(text), "\x00")
		h.unmake(ctx, marks{name: name, dirs: dirs})
	}
}
