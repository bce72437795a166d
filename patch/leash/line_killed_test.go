package leash

import (
	"errors"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"belay/agent/maint"
)

// A leash is killed: another goes on, with the same deadline and knowledge, and
// the holder's next words reach it.
func TestLeashIsKilled(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	l := s.hold(time.Minute, 2*time.Second)
	before := l.Status()
	first := s.pid()
	s.signal(syscall.SIGKILL)
	for range 50 { // while it is being replaced
		l.Paused(a)
		l.Released(b)
		l.Paused(b)
		time.Sleep(time.Millisecond)
	}
	s.await("another leash", func() bool { return s.pid() != first && l.Check() == nil })
	if _, err := l.Events(t.Context()); err != nil {
		t.Fatal(err)
	}
	notes, err := readNotes(s.Dir, testOp)
	if err != nil {
		t.Fatal(err)
	}
	if notes.Deadline != before.Deadline || notes.guest(a).Fate != Paused || notes.guest(b).Fate != Paused || notes.guest(c).Fate != Left {
		t.Errorf("it goes on with %+v, before it was %+v", notes, before)
	}
	if err := l.Err(); err != nil || s.runs(a) || s.runs(b) {
		t.Fatalf("it has not held: %v", err)
	}
	// That one does its work, when the holder dies.
	l.Close()
	if took := s.released(a, b); took < 1500*time.Millisecond || took > 6*time.Second {
		t.Errorf("released %s after the holder's end, with a silence of 2s", took)
	}
}

// A leash dies and there is no other: the pause must end now, and the holder
// hears of it at once.
func TestLeashCannotBeReplaced(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	l := s.hold(time.Minute, 3*time.Second)
	s.exec.fail(errors.New("no more processes"))
	s.signal(syscall.SIGKILL)
	if took := s.lost(l); took > 3*time.Second {
		t.Errorf("the holder hears of it after %s", took)
	}
	if err := l.Err(); errors.Is(err, ErrFired) || !strings.Contains(err.Error(), "no more processes") {
		t.Errorf("the line is lost for %v", err)
	}
	if got := l.Ours(); !slices.Equal(got, []string{a, b}) {
		t.Errorf("to be released are %q", got)
	}
	l.Released(a) // is no use, and does no harm
	if _, err := l.Disarm(t.Context()); err == nil {
		t.Error("it was disarmed")
	}
}

// What kills every leash would kill it when it is needed.
func TestLeashesDieAgainAndAgain(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	l := s.hold(time.Minute, 3*time.Second)
	for range maxReplaced {
		killed := s.pid()
		s.signal(syscall.SIGKILL)
		s.await("another leash", func() bool { return s.pid() != killed && l.Check() == nil && lives(s.pid()) })
		if _, err := l.Events(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	s.signal(syscall.SIGKILL)
	s.lost(l)
	if s.exec.count() != 1+maxReplaced {
		t.Errorf("%d leashes were started", s.exec.count())
	}
}

// A leash that is there and does not answer: it cannot be replaced, and telling
// it costs the holder nothing.
func TestLeashHangs(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	l := s.hold(time.Minute, time.Second)
	s.signal(syscall.SIGSTOP)
	begun := time.Now()
	for range 2000 {
		l.Paused(a)
	}
	if took := time.Since(begun); took > time.Second {
		t.Errorf("2000 words took %s", took)
	}
	s.await("doubt", func() bool { return l.Check() != nil })
	if took := time.Since(begun); took > 3*time.Second {
		t.Errorf("doubted after %s only, with a silence of 1s", took)
	}
	s.lost(l)
	if took := time.Since(begun); took > 4*time.Second {
		t.Errorf("given up after %s, with a silence of 1s", took)
	}
	if l.Err() == nil || errors.Is(l.Err(), ErrFired) || s.exec.count() != 1 {
		t.Errorf("%v, %d leashes", l.Err(), s.exec.count())
	}
	// It has what it was told before, and when it goes on it hears of nobody.
	s.signal(syscall.SIGCONT)
	s.released(a, b)
}

// A holder that stood still hears that the leash has fired.
func TestHolderStoodStill(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	holder := s.holder(500 * time.Millisecond)
	if err := holder.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	s.released(a, b)
	if err := holder.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	l, err := s.Attach(t.Context(), testOp)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s.lost(l)
	if !errors.Is(l.Err(), ErrFired) || len(l.Ours()) > 0 {
		t.Errorf("%v, held are %q", l.Err(), l.Ours())
	}
}

func TestHolderIsKilled(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	holder := s.holder(time.Second)
	time.Sleep(2 * time.Second)
	if s.runs(a) || s.runs(b) {
		t.Fatal("it was not held")
	}
	if err := holder.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if took := s.released(a, b); took > 4*time.Second {
		t.Errorf("released after %s, with a silence of 1s", took)
	}
	all, err := Leftovers(s.Dir)
	if err != nil || len(all) != 1 || !all[0].Alive || all[0].Void || all[0].Fired == "" {
		t.Errorf("left is %+v, %v", all, err)
	}
	if err := Discard(s.Dir, testOp); err == nil {
		t.Error("discarded while the leash lives")
	}
	s.signal(syscall.SIGTERM)
	s.await("the leash's end", func() bool { return !lives(s.pid()) })
	all, err = Leftovers(s.Dir)
	if err != nil || len(all) != 1 || all[0].Alive || !slices.Contains(kinds(all[0].Events), maint.LeashReleased) {
		t.Errorf("left is %+v, %v", all, err)
	}
	if err := Discard(s.Dir, testOp); err != nil {
		t.Error(err)
	}
	if all, err := Leftovers(s.Dir); err != nil || len(all) > 0 {
		t.Errorf("after that, left is %+v, %v", all, err)
	}
}

// Holder and leash are killed together. The next leash, whoever starts it, goes
// on from the notes; so does the next holder.
func TestBothAreKilled(t *testing.T) {
	t.Parallel()
	t.Run("the leash is started again", func(t *testing.T) {
		t.Parallel()
		s := newSite(t)
		holder := s.holder(time.Second)
		_ = holder.Process.Signal(syscall.SIGSTOP) // or it would start another
		s.await("the holder's stop", func() bool { return stopped(holder.Process.Pid) })
		s.signal(syscall.SIGKILL)
		_ = holder.Process.Kill()
		if s.runs(a) {
			t.Fatal("it runs")
		}
		if err := Discard(s.Dir, testOp); !isCode(err, maint.CodeBusy) {
			t.Errorf("discarded with guests paused: %v", err)
		}
		if _, err := s.exec.Launch(t.Context(), testOp); err != nil {
			t.Fatal(err)
		}
		if took := s.released(a, b); took > 5*time.Second {
			t.Errorf("released after %s, with a silence of 1s", took)
		}
	})
	t.Run("belayd is started again", func(t *testing.T) {
		t.Parallel()
		s := newSite(t)
		holder := s.holder(time.Second)
		before, err := readNotes(s.Dir, testOp)
		if err != nil {
			t.Fatal(err)
		}
		_ = holder.Process.Kill()
		s.signal(syscall.SIGKILL)
		l, err := s.Attach(t.Context(), testOp)
		if err != nil {
			t.Fatal(err)
		}
		if got := l.Ours(); !slices.Equal(got, []string{a, b}) || l.Status().Deadline != before.Deadline {
			t.Errorf("held are %q; %+v", got, l.Status())
		}
		time.Sleep(1500 * time.Millisecond)
		if s.runs(a) || l.Err() != nil {
			t.Errorf("it does not renew: %v", l.Err())
		}
		s.resume(l)
		if _, err := l.Disarm(t.Context()); err != nil {
			t.Error(err)
		}
	})
}
