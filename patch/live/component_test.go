package live_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/patch/live"
	"belay/patch/live/livetest"
)

// units are a systemd whose jobs do what a test says.
type units struct {
	do    func()
	fails bool
	ran   []string
}

func (u *units) Check(_ context.Context, s maint.HostStep) []maint.Problem {
	if s.Unit == "no-such.service" {
		return []maint.Problem{{Code: maint.CodeStep, Subject: s.Unit, Reason: "is not there", Remedy: "install it"}}
	}
	return nil
}

func (u *units) Run(_ context.Context, name string, s maint.HostStep, _ []string) maint.StepRun {
	u.ran = append(u.ran, name+" "+s.Unit+" "+s.Job)
	if u.do != nil {
		u.do()
	}
	if u.fails {
		return maint.StepRun{ExitCode: -1, Output: "restart of x: failed"}
	}
	return maint.StepRun{}
}

func (u *units) Forget(string) {}

// TestComponent: a unit is restarted, and what guests felt of it is found out.
func TestComponent(t *testing.T) {
	t.Parallel()
	type bed struct {
		guests []maint.Guest
		pid    int
		events chan maint.Event
		down   int // calls for which libvirt does not answer after the restart
		units  *units
	}
	for _, c := range []struct {
		name   string
		unit   string
		job    string
		during func(*bed)
		refuse maint.Code // by Preflight
		felt   string
		fails  bool
		unseen bool
	}{
		{name: "nobody feels it", unit: "libvirtd.service"},
		{name: "libvirt is away for a moment", unit: "libvirtd.service", unseen: true, during: func(b *bed) {
			b.down = 2
			b.events <- maint.Event{Kind: maint.EventDown}
		}},
		{name: "reload", unit: "virtlogd.service", job: "reload"},
		{name: "virtlogd is never restarted", unit: "virtlogd.service", refuse: maint.CodeComponent},
		{name: "not listed", unit: "ssh.service", refuse: maint.CodeComponent},
		{name: "another job", unit: "libvirtd.service", job: "stop", refuse: maint.CodeComponent},
		{name: "not there", unit: "no-such.service", refuse: maint.CodeStep},
		{name: "it does not start again", unit: "libvirtd.service", fails: true},
		{name: "a guest is paused", unit: "libvirtd.service", felt: "it is paused, and was running", during: func(b *bed) { b.guests[0].State = maint.GuestPaused }},
		{name: "a guest is paused and resumed", unit: "libvirtd.service", felt: "paused 1 times", during: func(b *bed) {
			b.events <- maint.Event{Kind: maint.EventLifecycle, UUID: "u1", Change: "suspended"}
			b.events <- maint.Event{Kind: maint.EventLifecycle, UUID: "u1", Change: "resumed"}
		}},
		{name: "a guest is rebooted into another process", unit: "libvirtd.service", felt: "process 8, and was 7", during: func(b *bed) { b.pid = 8 }},
		{name: "a guest was started anew", unit: "libvirtd.service", felt: "started anew", during: func(b *bed) { b.guests[0].ID = 2 }},
		{name: "a guest's QEMU is not to be seen any more", unit: "libvirtd.service", felt: "not to be seen", during: func(b *bed) { b.pid = 0 }},
		{name: "a guest is lost", unit: "libvirtd.service", felt: "runs no more", during: func(b *bed) { b.guests[0].State = maint.GuestShutoff }},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := &bed{guests: []maint.Guest{{Name: "web-1", UUID: "u1", State: maint.GuestRunning}, {Name: "off", UUID: "u2", State: maint.GuestShutoff}},
				pid: 7, events: make(chan maint.Event), units: &units{fails: c.fails}}
			if c.during != nil {
				b.units.do = func() { c.during(b) }
			}
			var result *maint.PatchResult
			s := &notes{data: make(map[string][]byte)}
			k := &live.Component{Op: "patch-1", Unit: c.unit, Job: c.job, Allowed: []string{"libvirtd.service", "virtlogd.service", "no-such.service"}, Steps: b.units, Wait: 5 * time.Second,
				QEMU: func(string) int { return b.pid },
				Guests: func(context.Context) ([]maint.Guest, error) {
					if b.down > 0 {
						b.down--
						return nil, maint.ErrHypervisorDown
					}
					return b.guests, nil
				},
				Subscribe: func() (<-chan maint.Event, func()) { return b.events, func() { close(b.events) } },
				Record:    func(r maint.PatchResult) error { result = &r; return nil }}
			ctx := t.Context()
			err := k.Preflight(ctx, s.of(live.PhasePreflight))
			if c.refuse != "" {
				refusal(t, err, c.refuse)
				if len(b.units.ran) > 0 {
					t.Errorf("refused, and run: %v", b.units.ran)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			err = k.Restart(ctx, s.of(live.PhaseRestart))
			if c.fails {
				if p := problem(t, err); p.Code != maint.CodeComponent {
					t.Errorf("%v", p)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			err = k.Prove(ctx, s.of(live.PhaseProve))
			if result == nil || len(result.Guests) != 1 || result.Guests[0].QEMU != 7 || result.Unwatched != c.unseen {
				t.Fatalf("%+v, %v", result, err)
			}
			if c.felt == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if p := refusal(t, err, maint.CodeGuestFelt); !strings.Contains(p.Reason, c.felt) || result.Guests[0].Problem == nil {
				t.Errorf("%v, %+v", p, result.Guests)
			}
		})
	}
}

// TestRestartSeenByAnotherBelayd: one that restarts itself tells that it has not watched,
// wherever it takes the operation up again.
func TestRestartSeenByAnotherBelayd(t *testing.T) {
	t.Parallel()
	for _, inRestart := range []bool{false, true} {
		var result maint.PatchResult
		s := &notes{data: make(map[string][]byte)}
		belayd := func() *live.Component {
			events := make(chan maint.Event)
			return &live.Component{Unit: "belayd.service", Allowed: []string{"belayd.service"}, Steps: &units{}, Wait: time.Second, QEMU: func(string) int { return 7 },
				Guests:    func(context.Context) ([]maint.Guest, error) { return guests(maint.GuestRunning, "booted"), nil },
				Subscribe: func() (<-chan maint.Event, func()) { return events, func() { close(events) } },
				Record:    func(r maint.PatchResult) error { result = r; return nil }}
		}
		one, two := belayd(), belayd()
		err := errors.Join(one.Preflight(t.Context(), s.of(live.PhasePreflight)), one.Restart(t.Context(), s.of(live.PhaseRestart)))
		if inRestart {
			err = errors.Join(err, two.Restart(t.Context(), s.of(live.PhaseRestart)))
		}
		if err := errors.Join(err, two.Prove(t.Context(), s.of(live.PhaseProve))); err != nil {
			t.Fatal(err)
		}
		if !result.Unwatched || len(result.Guests) != 1 {
			t.Errorf("taken up again in restart %t: %+v", inRestart, result)
		}
	}
}

func TestMicrocode(t *testing.T) {
	t.Parallel()
	b := newBench(t, livetest.Newer())
	var result *maint.PatchResult
	update := func(m live.Microcode) *live.MicrocodeUpdate {
		return &live.MicrocodeUpdate{Host: b.Host, Microcode: m, Record: func(r maint.PatchResult) error { result = &r; return nil }}
	}
	do := func(m live.Microcode) error {
		result = nil
		u := update(m)
		if err := u.Preflight(t.Context(), b.notes.of(live.PhasePreflight)); err != nil {
			return err
		}
		return u.Load(t.Context(), b.notes.of(live.PhaseMicrocode))
	}
	if err := do(b.Machine); err != nil {
		t.Fatal(err)
	}
	if result == nil || len(result.After) != 4 || result.After[0].Revision != "0x1f" || result.Before[3].Revision != "0x1e" {
		t.Errorf("%+v", result)
	}
	refusal(t, do(loads(func() error { return nil })), maint.CodeNothing)
	if p := problem(t, do(loads(func() error { return errors.New("EIO") }))); p.Code != maint.CodeKernelRefused {
		t.Errorf("%v", p)
	}
	if p := problem(t, do(loads(func() error { b.Say("WARNING: CPU: 1 PID: 1 at arch/x86/kernel/cpu/microcode/core.c:1"); return nil }))); p.Code != maint.CodeUnwell {
		t.Errorf("%v", p)
	}
	if p := problem(t, do(loads(func() error { b.SetMicrocode(2, "0x99"); return nil }))); p.Code != maint.CodeUnwell || !strings.Contains(p.Reason, "not alike") {
		t.Errorf("%v", p)
	}

	b = newBench(t, livetest.Debian12())
	refusal(t, do(b.Machine), maint.CodeNeedsReboot)
}

// loads is a kernel that loads microcode so.
type loads func() error

func (l loads) ReloadMicrocode(context.Context) error { return l() }

// TestQEMUVerdict: a stock QEMU needs rung B2.
func TestQEMUVerdict(t *testing.T) {
	t.Parallel()
	b := newBench(t, livetest.Debian12())
	for _, pid := range []int{0, 77} {
		why := live.Libpulp{Tree: b.Host.Tree}.Ready(pid)
		if p := live.QEMUVerdict("web-1", why); why == "" || p.Code != maint.CodeNeedsPause || !strings.Contains(p.Remedy, "replace-vmm web-1") {
			t.Errorf("process %d: %q, %v", pid, why, p)
		}
	}
}

// TestAlarms: what the kernel says when something is wrong, and what it says all day.
func TestAlarms(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]bool{
		"BUG: unable to handle page fault for address: ffffffffc0000000":     true,
		"WARNING: CPU: 3 PID: 1234 at kernel/livepatch/core.c:1 klp+0x1/0x2": true,
		"kernel BUG at mm/slub.c:379!":                                       true,
		"Oops: 0002 [#1] PREEMPT SMP NOPTI":                                  true,
		"general protection fault, probably for non-canonical address":       true,
		"watchdog: BUG: soft lockup - CPU#1 stuck for 26s! [kworker]":        true,
		"INFO: task qemu-system-x86:77 blocked for more than 120 seconds.":   true,
		"rcu: INFO: rcu_preempt self-detected stall on CPU":                  true,
		"mce: [Hardware Error]: Machine check events logged":                 true,
		"livepatch: enabling patch 'fix_1'":                                  false,
		"fix_1: module verification failed: signature and/or required key":   false,
		"fix_1: loading out-of-tree module taints kernel.":                   false,
		"vnet0: entered promiscuous mode":                                    false,
		"warning: `x' uses wireless extensions":                              false,
		"systemd[1]: WARNING: a unit says so":                                false,
	} {
		if got := (live.Line{Text: text}).Alarm(); got != want {
			t.Errorf("%q: %t, want %t", text, got, want)
		}
	}
	b := newBench(t, livetest.Debian12())
	b.Say("one")
	all, err := b.Host.Tree.KernelLog(0)
	if err != nil || len(all) != 2 {
		t.Fatalf("%v, %v", all, err)
	}
	b.Say("two")
	if more, err := b.Host.Tree.KernelLog(all[1].Seq); err != nil || !slices.Equal(more, []live.Line{{Seq: 3, Text: "two"}}) {
		t.Errorf("%v, %v", more, err)
	}
}
