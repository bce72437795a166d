package leash

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"belay/agent/boottime"
	"belay/agent/maint"
)

// left are the names of the files that leashes have left.
func (s *site) left() (names []string) {
	s.t.Helper()
	entries, err := os.ReadDir(s.Dir)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func nobody(maint.OpID) bool { return false }

// What is left wherever belayd, its leash or both are killed is swept, unless
// the leash lives, a guest may be held, or the operation will be taken up.
func TestSweep(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		kill  func(s *site)
		stays string // why; "" for what is swept
	}{
		{"belayd before the order, and the leash", func(s *site) {
			s.unarmed()
			s.signal(syscall.SIGKILL)
		}, ""},
		{"belayd before the order", func(s *site) { s.unarmed() }, "the leash lives"},
		{"belayd, while guests are held", func(s *site) {
			_ = s.holder(late).Process.Kill()
		}, "the leash lives"},
		{"both, while guests are held", func(s *site) {
			_ = s.holder(late).Process.Kill()
			s.signal(syscall.SIGKILL)
		}, "may still be paused"},
		{"belayd, and the leash has released them and ended", func(s *site) {
			_ = s.holder(late).Process.Kill()
			s.signal(syscall.SIGTERM)
			s.released(a, b)
			s.await("the leash's end", func() bool { return !lives(s.pid()) })
		}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			c.kill(s)
			before := s.left()
			if len(before) == 0 {
				t.Fatal("nothing is left")
			}
			swept, err := Sweep(s.Dir, func(op maint.OpID) bool { return op == testOp })
			if err != nil || len(swept) > 0 || !slices.Equal(s.left(), before) {
				t.Fatalf("of an operation that is open, swept are %+v (%v), left is %q of %q", swept, err, s.left(), before)
			}
			swept, err = Sweep(s.Dir, nobody)
			switch {
			case c.stays == "":
				if err != nil || len(swept) != 1 || swept[0].Op != testOp || len(s.left()) > 0 {
					t.Errorf("swept are %+v (%v), left is %q", swept, err, s.left())
				}
			case c.stays == "the leash lives":
				if err != nil || len(swept) > 0 || !slices.Equal(s.left(), before) {
					t.Errorf("of a leash that lives, swept are %+v (%v), left is %q of %q", swept, err, s.left(), before)
				}
			case err == nil || !strings.Contains(err.Error(), c.stays) || len(swept) > 0 || !slices.Contains(s.left(), string(testOp)+notesExt):
				t.Errorf("swept are %+v (%v), left is %q", swept, err, s.left())
			}
		})
	}
}

// The notes of a dead leash stay as long as it had something left to do.
func TestDiscardRefuses(t *testing.T) {
	t.Parallel()
	boot, err := boottime.ID()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		boot string
		g    GuestStatus
		want string
	}{
		"paused":                 {boot, GuestStatus{Fate: Paused}, "may still be paused"},
		"armed":                  {boot, GuestStatus{Fate: Armed}, "may still be paused"},
		"without its leases":     {boot, GuestStatus{Fate: Released, Unleased: true}, "without the leases"},
		"released":               {boot, GuestStatus{Fate: Released}, ""},
		"left":                   {boot, GuestStatus{Fate: Left}, ""},
		"before the host booted": {"another", GuestStatus{Fate: Released, Unleased: true}, ""},
	} {
		dir := filepath.Join(t.TempDir(), "leash")
		if err := makeDir(dir); err != nil {
			t.Fatal(err)
		}
		c.g.Guest = Guest{UUID: "u1", Name: "web-1"}
		s := &Status{Op: testOp, Boot: c.boot, Guests: []GuestStatus{c.g}}
		if err := s.write(dir); err != nil {
			t.Fatal(err)
		}
		err := Discard(dir, testOp)
		_, gone := os.Stat(path(dir, testOp, notesExt))
		if c.want == "" && (err != nil || gone == nil) || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || gone != nil) {
			t.Errorf("%s: %v, the notes: %v", name, err, gone)
		}
	}
}

// unarmed starts a leash that gets no order, as its belayd has died.
func (s *site) unarmed() {
	s.t.Helper()
	if err := makeDir(s.Dir); err != nil {
		s.t.Fatal(err)
	}
	if _, err := s.exec.Launch(s.t.Context(), testOp); err != nil {
		s.t.Fatal(err)
	}
	s.await("the leash", func() bool { return s.pid() != 0 })
}

// A belayd that is killed in the middle of sweeping leaves what the next one
// sweeps; what is not a leash's is left alone.
func TestSweepIsKilled(t *testing.T) {
	t.Parallel()
	for gone := range files {
		dir := t.TempDir()
		for _, ext := range files[gone:] {
			text := ""
			if ext == notesExt {
				text = fmt.Sprintf(`{"op":%q,"boot":"another"}`, testOp)
			}
			if err := os.WriteFile(path(dir, testOp, ext), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		theirs := filepath.Join(dir, "theirs.txt")
		if err := os.WriteFile(theirs, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		swept, err := Sweep(dir, nobody)
		if entries, _ := os.ReadDir(dir); err != nil || len(swept) != 1 || len(entries) != 1 || entries[0].Name() != "theirs.txt" {
			t.Errorf("with %q left, swept are %+v (%v), now there are %v", files[gone:], swept, err, entries)
		}
	}
	if swept, err := Sweep(filepath.Join(t.TempDir(), "none"), nobody); err != nil || len(swept) > 0 {
		t.Errorf("of no folder: %+v, %v", swept, err)
	}
}
