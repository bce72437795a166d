package crowd

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	Main()
	os.Exit(m.Run())
}

func three(t *testing.T) *Crowd {
	t.Helper()
	if os.Getenv("BELAY_LAB") == "skip" {
		t.Skip("BELAY_LAB=skip: tests that need network namespaces are left out")
	}
	c, err := New(t.Context(), 3)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// belay starts a server that the test ends.
func belay(ctx context.Context, t *testing.T, c *Crowd) *Server {
	t.Helper()
	s, err := c.Belay(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func closed(t *testing.T, s *Server) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// journals are those that a server has.
func journals(t *testing.T, pid int) (all []string) {
	t.Helper()
	fds, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil && filepath.Base(to) == "journal.db" {
			all = append(all, filepath.Dir(to))
		}
	}
	return all
}

func TestWaiting(t *testing.T) {
	t.Parallel()
	c := three(t)
	s := belay(t.Context(), t, c)
	defer closed(t, s)
	w, err := s.Wait(t.Context(), 3)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	for _, guests := range [][]int{{1}, {0, 2}} {
		all, err := w.Announce(t.Context(), guests...)
		if err != nil || len(all) != len(guests) {
			t.Fatalf("%v have seen %v: %v", guests, all, err)
		}
		for _, v := range all {
			// It may be seen before who made it durable has looked at the clock again.
			if v.Asked <= 0 || v.Durable <= v.Asked || v.Seen <= v.Asked || v.Seen > v.Asked+time.Minute {
				t.Errorf("%+v is not in order", v)
			}
		}
	}
	if all, err := w.Cancel(t.Context(), 0, 1, 2); err != nil || len(all) != 3 {
		t.Errorf("%v have seen it cancelled: %v", all, err)
	}
}

// A change that is not the expected one is no measurement.
func TestWrongGuest(t *testing.T) {
	t.Parallel()
	w := &Waiting{seen: make(chan seen, 1)}
	for _, s := range []seen{{guest: 2, events: 1}, {guest: 1, events: 2}, {guest: 1, events: 1, err: errors.New("hung up")}} {
		w.seen <- s
		if all, err := w.collect(t.Context(), map[int]Told{1: {}}, 1); err == nil {
			t.Errorf("%+v is taken for %v", s, all)
		}
	}
}

func TestPolling(t *testing.T) {
	t.Parallel()
	c := three(t)
	s := belay(t.Context(), t, c)
	defer closed(t, s)
	empty, err := s.Length(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Announce(0); err != nil {
		t.Fatal(err)
	}
	full, err := s.Length(t.Context(), 0)
	if err != nil || full <= empty {
		t.Errorf("a document with an event has %d bytes, one without %d: %v", full, empty, err)
	}
	if other, err := s.Length(t.Context(), 1); err != nil || other > empty+20 { // its number has more digits
		t.Errorf("another's has %d: %v", other, err)
	}
	plain, err := c.Plain(t.Context(), full)
	if err != nil {
		t.Fatal(err)
	}
	defer closed(t, plain)
	if n, err := plain.Length(t.Context(), 0); err != nil || n != full {
		t.Errorf("the plain server answers %d bytes instead of %d: %v", n, full, err)
	}
	for _, s := range []*Server{s, plain} {
		p, err := s.Poll(t.Context(), []int{0, 1})
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		took, err := p.Run(t.Context(), 2)
		if err != nil || len(took) != 4 || slices.Min(took) <= 0 {
			t.Errorf("the answers took %v: %v", took, err)
		}
	}
}

func TestFlood(t *testing.T) {
	t.Parallel()
	c := three(t)
	s := belay(t.Context(), t, c)
	defer closed(t, s)
	ctx, stop := context.WithTimeout(t.Context(), time.Second)
	defer stop()
	sent, answered, err := s.Flood(ctx, 2, 1000)
	if err != nil || sent < 100 || answered < 20 || answered > sent {
		t.Errorf("%d of %d requests were answered: %v", answered, sent, err)
	}
}

// Whoever ends without a word leaves nothing behind.
func TestInterrupted(t *testing.T) {
	t.Parallel()
	c := three(t)
	ctx, interrupt := context.WithCancel(t.Context())
	s := belay(ctx, t, c)
	dirs := journals(t, s.PID())
	if len(dirs) != 1 {
		t.Errorf("the server has the journals %v", dirs)
	}
	w, err := s.Wait(ctx, 3)
	if err != nil {
		t.Fatal(err)
	}
	interrupt()
	w.Close()
	closed(t, s)
	for _, dir := range dirs {
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", dir, err)
		}
	}
}
