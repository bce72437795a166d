package agent

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"belay/agent/boottime"
	"belay/agent/journal"
	"belay/agent/maint"
	"belay/patch/leash"
	"belay/patch/preserve"
	"belay/patch/preserve/preservetest"
)

// oneGuest is a hypervisor with one guest.
type oneGuest struct {
	Hypervisor
	mu    sync.Mutex
	state maint.GuestState
	err   error
}

// is has the guest be in a state, and all calls fail with err.
func (h *oneGuest) is(s maint.GuestState, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.state, h.err = s, err
}

func (h *oneGuest) Guest(ctx context.Context, _ string) (maint.Guest, error) {
	s, _, err := h.State(ctx, "")
	return maint.Guest{UUID: "u1", Name: "web-1", State: s}, err
}

func (h *oneGuest) State(context.Context, string) (maint.GuestState, string, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.state, "user", h.err
}

func (h *oneGuest) Resume(context.Context, string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.err == nil {
		h.state = maint.GuestRunning
	}
	return h.err
}

// runs checks that the guest does.
func (h *oneGuest) runs(t *testing.T) {
	t.Helper()
	if s, _, err := h.State(t.Context(), ""); s != maint.GuestRunning || err != nil {
		t.Errorf("the guest is %s, %v", s, err)
	}
}

func (h *oneGuest) Suspend(context.Context, string) error { return errors.New("not asked for") }

// leashed is a replacement whose leash is armed, and whose belayd is alive.
func leashed(t *testing.T) (l *pauseLeash, all *preservetest.Leashes, h *oneGuest, alive *atomic.Bool) {
	t.Helper()
	h, alive = &oneGuest{state: maint.GuestRunning}, new(atomic.Bool)
	alive.Store(true)
	all = &preservetest.Leashes{Host: h, Alive: alive.Load}
	l = again(all, h)
	l.a.cfg.Hold.MaxPause.Duration = time.Hour
	if err := l.arm(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.is(maint.GuestPaused, nil)
	return l, all, h, alive
}

// again is the same replacement under the next belayd, or in its next step.
func again(all *preservetest.Leashes, h *oneGuest) *pauseLeash {
	a := &Agent{log: slog.New(slog.NewTextHandler(io.Discard, nil))}
	return &pauseLeash{a: a, op: maint.Op{ID: "vmm-1", Guest: "web-1", GuestUUID: "u1"}, leash: all, hyp: h}
}

func armed(all *preservetest.Leashes) bool { return slices.Contains(all.Armed(), "vmm-1") }

// What fails with the guest paused leaves the leash with it, which resumes it
// when belayd has ended; the next belayd takes its leash away once it runs.
func TestLeashStaysWithAPausedGuest(t *testing.T) {
	t.Parallel()
	for name, strike := range map[string]func(h *oneGuest){
		"paused":               func(*oneGuest) {},
		"libvirt is not there": func(h *oneGuest) { h.is(maint.GuestPaused, maint.ErrHypervisorDown) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l, all, h, alive := leashed(t)
				strike(h)
				if events := l.rest(t.Context(), errors.New("it cannot be resumed")); len(events) != 1 || !armed(all) {
					t.Fatalf("armed: %t, %v", armed(all), events)
				}
				// The undo, which does not get on either.
				l = again(all, h)
				if err := l.takeUp(t.Context()); err != nil || l.line == nil || !armed(all) {
					t.Fatalf("taken up: %v, %v, armed: %t", l.line, err, armed(all))
				}
				l.rest(t.Context(), errors.New("it still cannot be resumed"))
				if err := l.takeUp(t.Context()); err != nil {
					t.Fatal(err)
				}
				if events := l.rest(t.Context(), errors.New("it still cannot be resumed")); len(events) > 0 {
					t.Errorf("it tells again: %v", events)
				}
				alive.Store(false)
				time.Sleep(time.Minute)
				if s, _, err := h.State(t.Context(), ""); err != nil {
					h.is(s, nil)
				}
				time.Sleep(time.Minute)
				h.runs(t)
				l = again(all, h)
				if err := l.takeUp(t.Context()); err != nil || l.line != nil || armed(all) {
					t.Errorf("in the end: %v, %v, armed: %t", l.line, err, armed(all))
				}
			})
		})
	}
}

// A leash that there is no more need for is disarmed, however it ended.
func TestLeashIsDisarmed(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		state   maint.GuestState
		err     error
		failure error
	}{
		"it has crossed":            {maint.GuestShutoff, nil, nil},
		"it runs on":                {maint.GuestRunning, nil, errors.New("called off")},
		"it has ended":              {maint.GuestShutoff, nil, errors.New("it is off")},
		"it has ended, a transient": {"", maint.ErrNoGuest, errors.New("it is off")},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l, all, h, _ := leashed(t)
				h.is(c.state, c.err)
				if events := l.rest(t.Context(), c.failure); armed(all) || len(events) != 2 {
					t.Errorf("armed: %t, %v", armed(all), events)
				}
			})
		})
	}
}

// remnants is a host where leashes have left notes.
type remnants struct {
	preserve.Leash
	left []leash.Leftover
}

func (r remnants) Leftovers() ([]leash.Leftover, error) { return r.left, nil }

// A leash that died before it had seen to its guests, and that nobody takes up, is
// a condition of the host for as long as it shows.
func TestAbandonedGuests(t *testing.T) {
	j, err := journal.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	open, err := json.Marshal(maint.Op{ID: "hold-open", Kind: maint.OpHold})
	if err != nil {
		t.Fatal(err)
	}
	if err := j.Append(maint.Record{Op: "hold-open", Kind: maint.RecAccepted, Data: open}); err != nil {
		t.Fatal(err)
	}
	paused, runs := maint.Guest{UUID: "u1", State: maint.GuestPaused}, maint.Guest{UUID: "u1", State: maint.GuestRunning}
	held, free := leash.GuestStatus{Fate: leash.Paused}, leash.GuestStatus{Fate: leash.Released, Unleased: true}
	for name, c := range map[string]struct {
		op          maint.OpID
		alive, void bool
		notes       leash.GuestStatus
		now         maint.Guest
		want        maint.Code
	}{
		"paused":                  {"hold-1", false, false, held, paused, maint.CodePaused},
		"without its leases":      {"hold-1", false, false, free, runs, maint.CodeLeash},
		"on the way home":         {"vmm-1-home", false, false, held, paused, maint.CodePaused},
		"resumed since":           {"hold-1", false, false, held, runs, ""},
		"stopped since":           {"hold-1", false, false, free, paused, ""},
		"gone since":              {"hold-1", false, false, held, maint.Guest{UUID: "u2", State: maint.GuestPaused}, ""},
		"its leash lives":         {"hold-1", true, false, held, paused, ""},
		"the host has booted":     {"hold-1", false, true, held, paused, ""},
		"its operation goes on":   {"hold-open", false, false, held, paused, ""},
		"its operation goes home": {"hold-open-home", false, false, held, paused, ""},
	} {
		c.notes.Guest = leash.Guest{UUID: "u1", Name: "web-1"}
		l := leash.Leftover{Status: leash.Status{Op: c.op, Guests: []leash.GuestStatus{c.notes}}, Alive: c.alive, Void: c.void}
		a := &Agent{journal: j, preserve: Preserve{Leash: remnants{left: []leash.Leftover{l}}}}
		cs := a.abandoned(a.leftovers(), []maint.Guest{c.now})
		if c.want == "" && len(cs) > 0 || c.want != "" && (len(cs) != 1 || cs[0].Code != c.want || cs[0].Remedy == "") {
			t.Errorf("%s: %+v", name, cs)
		}
	}
}

// A hold whose time has passed, and whose guests are not known to run, is a
// condition of the host.
func TestOverdueHold(t *testing.T) {
	j, err := journal.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	open, err := json.Marshal(maint.Op{ID: "hold-open", Kind: maint.OpHold})
	if err != nil {
		t.Fatal(err)
	}
	if err := j.Append(maint.Record{Op: "hold-open", Kind: maint.RecAccepted, Data: open}); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		op   maint.OpID
		late time.Duration
		fate leash.Fate
		void bool
		want bool
	}{
		"paused":              {"hold-open", time.Minute, leash.Paused, false, true},
		"on the way home":     {"hold-open-home", time.Minute, leash.Armed, false, true},
		"in time":             {"hold-open", -time.Minute, leash.Paused, false, false},
		"just now":            {"hold-open", time.Second / 2, leash.Paused, false, false},
		"released":            {"hold-open", time.Minute, leash.Released, false, false},
		"ended":               {"hold-1", time.Minute, leash.Paused, false, false},
		"the host has booted": {"hold-open", time.Minute, leash.Paused, true, false},
	} {
		l := leash.Leftover{Status: leash.Status{Op: c.op, Deadline: boottime.Now() - c.late,
			Guests: []leash.GuestStatus{{Guest: leash.Guest{UUID: "u1", Name: "web-1"}, Fate: c.fate}}}, Alive: true, Void: c.void}
		a := &Agent{journal: j, view: newInventory(nil, slog.New(slog.DiscardHandler)), preserve: Preserve{Leash: remnants{left: []leash.Leftover{l}}}}
		cs := a.conditions(&snapshot{})
		if !c.want && len(cs) > 0 || c.want && (len(cs) != 1 || cs[0].Remedy == "" ||
			cs[0].Text != "operation hold-open has not released its guests 1m0s after its limit: web-1") {
			t.Errorf("%s: %+v", name, cs)
		}
	}
}

// deaf is a line to a leash that does not let go.
type deaf struct{ preserve.Line }

func (deaf) Disarm(context.Context) ([]maint.LeashEvent, error) {
	return nil, errors.New("no answer in time")
}

// A leash that does not let go at the point of no return has the guest as before.
func TestLeashDoesNotLetGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, all, h, alive := leashed(t)
		l.line = deaf{l.line}
		if err := l.pass(t.Context()); err == nil || l.line.Marks()["u1"] != preserve.Paused {
			t.Errorf("let go: %v, marks %v", err, l.line.Marks())
		}
		l.rest(t.Context(), errors.New("called off"))
		alive.Store(false)
		time.Sleep(time.Minute)
		h.runs(t)
		_ = again(all, h).takeUp(t.Context())
	})
}

// A leash that has resumed the guest in its old QEMU calls the rest off.
func TestLeashHasResumed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, _, h, alive := leashed(t)
		alive.Store(false)
		time.Sleep(time.Minute)
		if l.pass(t.Context()) == nil {
			t.Error("the rest goes on")
		}
		h.runs(t)
	})
}
