package leash

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
)

// kinds are the kinds of events, in order.
func kinds(events []maint.LeashEvent) (k []string) {
	for _, e := range events {
		k = append(k, e.Kind)
	}
	return k
}

func TestLine(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.set(c, "paused") // by somebody else
	l := s.hold(time.Minute, time.Second)
	st := l.Status()
	if st.guest(c).Fate != Left || !slices.Equal(l.Ours(), []string{a, b}) {
		t.Errorf("held are %q, of %+v", l.Ours(), st.Guests)
	}
	if !slices.Contains(st.Warnings, "a test has started it") {
		t.Errorf("the launcher's warning is lost: %q", st.Warnings)
	}
	if left := time.Until(l.Deadline()); left > time.Minute || left < 50*time.Second {
		t.Errorf("the deadline is in %s", left)
	}
	time.Sleep(3 * time.Second) // far longer than the silence
	if err := errors.Join(l.Err(), l.Check()); err != nil || s.runs(a) || s.runs(b) {
		t.Fatalf("it has not held: %v", err)
	}
	if _, err := l.Disarm(t.Context()); !isCode(err, maint.CodeGuestPaused) {
		t.Errorf("disarmed with guests paused: %v", err)
	}
	s.resume(l)
	pid := s.pid()
	events, err := l.Disarm(t.Context())
	if want := []string{maint.LeashArmed, maint.LeashRenewed, maint.LeashDisarmed}; err != nil || !slices.Equal(kinds(events), want) {
		t.Errorf("events %+v, %v; want %q", events, err, want)
	}
	if n := events[1].Count; n < 6 || n > 12 {
		t.Errorf("renewed %d times in three seconds, with a silence of one", n)
	}
	s.await("the leash's end", func() bool { return !lives(pid) })
	if s.exec.count() != 1 {
		t.Errorf("%d leashes were started", s.exec.count())
	}
	if left, err := os.ReadDir(s.Dir); err != nil || len(left) > 0 {
		t.Errorf("it leaves %v, %v", left, err)
	}
	if s.runs(c) {
		t.Error("somebody else's guest was resumed")
	}
	if err := l.Err(); err != nil {
		t.Errorf("a line that was disarmed: %v", err)
	}
	if _, err := l.Events(t.Context()); err == nil {
		t.Error("a line that was disarmed answers")
	}
}

func isCode(err error, code maint.Code) bool {
	var p *maint.Problem
	return errors.As(err, &p) && p.Code == code
}

func TestLineFires(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	l := s.hold(500*time.Millisecond, 3*time.Second)
	if late := time.Since(l.Deadline()) + s.released(a, b); late > 2*time.Second {
		t.Errorf("released after %s", late)
	}
	s.lost(l)
	if err := l.Err(); !errors.Is(err, ErrFired) || l.Check() == nil {
		t.Errorf("the line is lost for %v", err)
	}
	events, err := l.Disarm(t.Context()) // c is waited for: it was Left
	if want := []string{maint.LeashArmed, maint.LeashFired, maint.LeashReleased, maint.LeashReleased, maint.LeashDisarmed}; err != nil ||
		!slices.Equal(slices.DeleteFunc(kinds(events), func(k string) bool { return k == maint.LeashRenewed }), want) {
		t.Errorf("events %q, %v; want %q", kinds(events), err, want)
	}
}

func TestArmIsRefused(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	gone := order(time.Minute, 0)
	gone.Guests = append(gone.Guests, Guest{UUID: "dddddddd-0000-0000-0000-000000000000", Name: "guest-d"})
	if _, err := s.Arm(t.Context(), gone); !errors.Is(err, maint.ErrNoGuest) || !strings.Contains(err.Error(), "guest-d") {
		t.Errorf("a guest that is not there: %v", err)
	}
	// The same operation, put right, has the leash that is there.
	l, err := s.Arm(t.Context(), order(time.Minute, 0))
	if err != nil || s.exec.count() != 1 {
		t.Fatalf("the second order: %v, %d leashes", err, s.exec.count())
	}
	l.Close()

	bad := func(change func(*Order)) Order { o := order(time.Minute, 0); change(&o); return o }
	for _, o := range []Order{
		bad(func(o *Order) { o.Op = "../../etc/passwd" }), bad(func(o *Order) { o.Op = "" }),
		bad(func(o *Order) { o.Guests = nil }), bad(func(o *Order) { o.MaxPause = 0 }),
		bad(func(o *Order) { o.MaxPause = -1 }), bad(func(o *Order) { o.Silence = time.Hour }),
	} {
		if _, err := s.Arm(t.Context(), o); !isCode(err, maint.CodeBadRequest) {
			t.Errorf("%+v: %v", o, err)
		}
	}
	s.signal(syscall.SIGKILL)
	s.exec.fail(errors.New("no more processes"))
	if _, err := s.Arm(t.Context(), bad(func(o *Order) { o.Op = "hold-2" })); err == nil || !strings.Contains(err.Error(), "no more processes") {
		t.Errorf("without a leash: %v", err)
	}
	if _, err := os.Stat(path(s.Dir, "hold-2", notesExt)); err == nil {
		t.Error("there are notes of a leash that was not armed")
	}
}

// The folder must keep others out.
func TestFolderOfOthers(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	if err := os.Mkdir(s.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Arm(t.Context(), order(time.Minute, 0)); err == nil || !strings.Contains(err.Error(), "0700") {
		t.Errorf("armed in a folder that others may enter: %v", err)
	}
	if s.exec.count() > 0 {
		t.Error("a leash was started")
	}
}

// A belayd that is restarted takes up a living leash.
func TestAttach(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	if _, err := s.Attach(t.Context(), testOp); !errors.Is(err, ErrNone) {
		t.Errorf("attached to nothing: %v", err)
	}
	holder := s.holder(time.Second)
	_ = holder.Process.Kill()
	l, err := s.Attach(t.Context(), testOp)
	if err != nil {
		t.Fatal(err)
	}
	if s.exec.count() > 0 {
		t.Error("another leash was started")
	}
	time.Sleep(2 * time.Second)
	if got := l.Ours(); s.runs(a) || !slices.Equal(got, []string{a, b}) {
		t.Errorf("it does not hold: %v, held are %q", l.Err(), got)
	}
	s.resume(l)
	events, err := l.Disarm(t.Context())
	if err != nil || kinds(events)[0] != maint.LeashArmed {
		t.Errorf("%q, %v", kinds(events), err)
	}
	if _, err := s.Attach(t.Context(), testOp); !errors.Is(err, ErrNone) {
		t.Errorf("attached to a leash that was disarmed: %v", err)
	}

	old := &Status{Op: testOp, Boot: "another", Guests: []GuestStatus{{Guest: Guest{UUID: a}, Fate: Paused}}}
	if err := old.write(s.Dir); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Attach(t.Context(), testOp); !errors.Is(err, ErrNone) {
		t.Errorf("attached to a leash of another boot: %v", err)
	}
	if all, err := Leftovers(s.Dir); err != nil || len(all) != 1 || !all[0].Void {
		t.Errorf("left is %+v, %v", all, err)
	}
	if err := Discard(s.Dir, testOp); err != nil {
		t.Error(err)
	}
}

func TestDamagedLeftovers(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	if all, err := Leftovers(s.Dir); err != nil || len(all) > 0 {
		t.Errorf("of no folder: %+v, %v", all, err)
	}
	good := &Status{Op: "hold-2", Boot: "another"}
	err := errors.Join(os.Mkdir(s.Dir, 0o700), good.write(s.Dir),
		os.WriteFile(filepath.Join(s.Dir, "hold-1.json"), []byte("{"), 0o600),
		os.WriteFile(filepath.Join(s.Dir, "hold-3.json"), []byte(`{"op":"hold-2"}`), 0o600),
		os.WriteFile(filepath.Join(s.Dir, "hold-4.json.new"), []byte("{"), 0o600),
		os.Mkdir(filepath.Join(s.Dir, "..json"), 0o700))
	if err != nil {
		t.Fatal(err)
	}
	all, err := Leftovers(s.Dir)
	if len(all) != 1 || all[0].Op != "hold-2" || err == nil || !strings.Contains(err.Error(), "hold-1") || !strings.Contains(err.Error(), "hold-3") {
		t.Errorf("%+v, %v", all, err)
	}
	if err := Discard(s.Dir, "hold-1"); err != nil {
		t.Error(err)
	}
	if _, err := Leftovers(s.Dir); err == nil || strings.Contains(err.Error(), "hold-1") {
		t.Errorf("after that: %v", err)
	}
}

// Notes that are not a file, or have no end, hold nobody up; and who cannot read
// them does not remove them.
func TestNotesThatAreNone(t *testing.T) {
	t.Parallel()
	for name, put := range map[string]func(file string) error{
		"pipe":   func(file string) error { return unix.Mkfifo(file, 0o600) },
		"device": func(file string) error { return os.Symlink("/dev/zero", file) },
		"folder": func(file string) error { return os.Mkdir(file, 0o700) },
		"large": func(file string) error {
			return errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, maxReply+1))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			notes := filepath.Join(s.Dir, string(testOp)+notesExt)
			if err := errors.Join(os.Mkdir(s.Dir, 0o700), put(notes)); err != nil {
				t.Fatal(err)
			}
			read := make(chan error, 1)
			go func() { _, err := readNotes(s.Dir, testOp); read <- err }()
			select {
			case err := <-read:
				if err == nil || errors.Is(err, errDamaged) {
					t.Fatalf("they were read: %v", err)
				}
			case <-time.After(20 * time.Second):
				t.Fatal("who reads them hangs")
			}
			if all, err := Leftovers(s.Dir); err == nil || len(all) > 0 {
				t.Errorf("left over: %+v, %v", all, err)
			}
			if swept, err := Sweep(s.Dir, nobody); err == nil || len(swept) > 0 {
				t.Errorf("swept: %+v, %v", swept, err)
			}
			if _, err := os.Lstat(notes); err != nil {
				t.Errorf("they have gone: %v", err)
			}
		})
	}
}

// There is one leash for an operation, also when two are started at once.
func TestOneLeash(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	l := s.hold(time.Minute, time.Second)
	first := s.pid()
	for range 3 {
		if _, err := s.exec.Launch(t.Context(), testOp); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(2 * claimWait)
	if s.pid() != first || !lives(first) || l.Err() != nil || s.runs(a) {
		t.Errorf("leash %d instead of %d, %v", s.pid(), first, l.Err())
	}
	if _, _, err := Listen(s.Dir, testOp); !errors.Is(err, errClaimed) {
		t.Errorf("claimed twice: %v", err)
	}
}

// The leash has nothing to do with what happens around it.
func TestHardened(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	l := s.hold(time.Minute, time.Second)
	pid := s.pid()
	for _, sig := range []syscall.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGPIPE} {
		s.signal(sig)
	}
	if _, err := l.Events(t.Context()); err != nil || !lives(pid) {
		t.Errorf("a signal has ended it: %v", err)
	}
	proc := func(name string) string {
		b, err := os.ReadFile(filepath.Join("/proc", itoa(pid), name))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if cwd, err := os.Readlink(filepath.Join("/proc", itoa(pid), "cwd")); cwd != "/" {
		t.Errorf("it is in %q, %v", cwd, err)
	}
	open, err := os.ReadDir(filepath.Join("/proc", itoa(pid), "fd"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range open {
		target, _ := os.Readlink(filepath.Join("/proc", itoa(pid), "fd", f.Name()))
		if strings.Contains(target, s.exec.inherited()) {
			t.Errorf("it has kept %s open", target)
		}
	}
	warnings := strings.Join(l.Status().Warnings, "\n")
	for what, has := range map[string]bool{
		"be spared by the OOM killer": strings.TrimSpace(proc("oom_score_adj")) == "-1000",
		"keep its memory in RAM":      !strings.Contains(proc("status"), "VmLck:\t       0 kB"),
		"run before others":           strings.Contains(proc("stat"), " 0 -20 "),
	} {
		if warned := strings.Contains(warnings, what); has == warned {
			t.Errorf("it can %s: %t, and says\n%s", what, has, warnings)
		}
	}

	// Told to end, it releases first.
	s.signal(syscall.SIGTERM)
	if took := s.released(a, b); took > 3*time.Second {
		t.Errorf("released after %s", took)
	}
	s.await("the leash's end", func() bool { return !lives(pid) })
}

// A leash that ends because it was disarmed has not died.
func TestDisarmedIsNotDead(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	const rounds = 50
	for range rounds {
		l, err := s.Arm(t.Context(), order(time.Minute, time.Second))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := l.Disarm(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if n := s.exec.count(); n != rounds {
		t.Errorf("%d leashes for %d orders", n, rounds)
	}

	// Nor has one that had fired and was disarmed by another holder.
	l := s.hold(100*time.Millisecond, time.Second)
	s.lost(l)
	other, err := s.Attach(t.Context(), testOp)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.Disarm(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.await("the line's end", func() bool { _, err := l.Events(t.Context()); return err != nil })
	if n := s.exec.count(); n != rounds+1 {
		t.Errorf("%d leashes for %d orders", n, rounds+1)
	}
}

// What the holder knows and the leash's answer come together, which may be older.
func TestLearn(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ holder, leash, want Fate }{
		{Armed, Armed, Armed}, {Armed, Left, Left}, {Armed, Released, Released}, {Armed, Paused, Paused},
		{Paused, Armed, Paused}, {Paused, Paused, Paused}, {Paused, Released, Released}, {Paused, Left, Left},
		{Left, Armed, Left}, {Left, Paused, Left}, {Released, Paused, Released}, {Released, Armed, Released},
	} {
		of := func(f Fate) *Status {
			return &Status{Op: testOp, Guests: []GuestStatus{{Guest: Guest{UUID: a}, Fate: f}}}
		}
		l := newLine(&Client{}, of(c.holder))
		l.learn(reply{Status: of(c.leash)})
		if got := l.s.guest(a).Fate; got != c.want {
			t.Errorf("the holder knows %s, the leash says %s: %s, want %s", c.holder, c.leash, got, c.want)
		}
	}
}

// A context that ends is no answer to wait for.
func TestNoAnswerInTime(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	l := s.hold(time.Minute, 30*time.Second)
	s.signal(syscall.SIGSTOP)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := l.Events(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	s.signal(syscall.SIGCONT)
	if _, err := l.Events(t.Context()); err != nil {
		t.Error(err)
	}
}
