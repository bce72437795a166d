package live

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"belay/agent/maint"
)

// Steps runs a unit's job; see package hoststep. A job of a name is begun once: Run waits for
// one that an earlier belayd began.
type Steps interface {
	Check(ctx context.Context, step maint.HostStep) []maint.Problem
	Run(ctx context.Context, name string, step maint.HostStep, env []string) maint.StepRun
	Forget(name string)
}

// Component is a unit that guests do not touch, to be restarted or reloaded.
type Component struct {
	Op      maint.OpID
	Unit    string
	Job     string   // "": restart
	Allowed []string // the units that may be
	Steps   Steps
	Guests  func(context.Context) ([]maint.Guest, error)
	// QEMU gives the process of a guest, 0 if it cannot be told.
	QEMU func(guest string) int
	// Subscribe follows what happens to guests.
	Subscribe func() (<-chan maint.Event, func())
	Record    func(maint.PatchResult) error
	Wait      time.Duration // for libvirt to answer after it

	pauses *pauses // of this belayd's life
}

// reloadOnly hold what guests' QEMUs have open, and keep it only over a reload, in which
// they execute themselves anew.
var reloadOnly = []string{"virtlogd.service", "virtlockd.service"}

func (c *Component) step() maint.HostStep { return maint.HostStep{Unit: c.Unit, Job: c.Job} }
func (c *Component) stepName() string     { return string(c.Op) + "-unit" }

// ComponentProblems is why a unit may not be restarted, or reloaded, under the guests.
func ComponentProblems(unit, job string, allowed []string) []maint.Problem {
	refuse := func(remedy, format string, args ...any) []maint.Problem {
		return []maint.Problem{*maint.Problemf(maint.CodeComponent, "unit "+unit, remedy, format, args...)}
	}
	switch {
	case !slices.Contains(allowed, unit):
		return refuse("add it to patch.components if guests do not touch it; else hold them meanwhile (belay hold --unit)", "is not listed as one that guests do not touch")
	case job != "" && job != "restart" && job != "reload":
		return refuse("restart or reload it", "%q is no job for it", job)
	case slices.Contains(reloadOnly, unit) && job != "reload":
		return refuse("reload it (--reload): it executes itself anew, and keeps what it has open", "guests lose their logs or leases when it is restarted")
	}
	return nil
}

// Preflight judges whether the unit may be restarted, and notes how guests are.
func (c *Component) Preflight(ctx context.Context, s Scratch) error {
	what := "cannot restart " + c.Unit
	if problems := ComponentProblems(c.Unit, c.Job, c.Allowed); len(problems) > 0 {
		return maint.Refuse(what, problems)
	}
	if problems := c.Steps.Check(ctx, c.step()); len(problems) > 0 {
		return maint.Refuse(what, problems)
	}
	guests, err := c.Guests(ctx)
	if err != nil {
		return maint.Refuse(what, []maint.Problem{*maint.Problemf(maint.CodeHypervisorDown, "libvirt", "systemctl status libvirtd virtqemud", "does not answer, so nobody could tell whether guests felt it: %v", err)})
	}
	return s.Save(c.look(guests))
}

// look is how the guests are that have a QEMU.
func (c *Component) look(guests []maint.Guest) (now []maint.GuestProof) {
	for _, g := range guests {
		if g.State.Active() {
			now = append(now, maint.GuestProof{Guest: g.Name, UUID: g.UUID, State: g.State, QEMU: c.QEMU(g.Name), ID: g.ID})
		}
	}
	return now
}

// Restart has systemd do the job. It cannot be taken back. A belayd that finds it begun has
// not seen all of it.
func (c *Component) Restart(ctx context.Context, s Scratch) error {
	begun := false
	switch found, err := s.Load(PhaseRestart, &begun); {
	case err != nil:
		return err
	case !found:
		if err := s.Save(true); err != nil {
			return err
		}
		c.pauses = newPauses(c.Subscribe)
	}
	run := c.Steps.Run(ctx, c.stepName(), c.step(), nil)
	if !run.OK() {
		c.pauses.end()
		return maint.Problemf(maint.CodeComponent, "unit "+c.Unit, "systemctl status "+c.Unit, "%s %s", run.Output, run.Error)
	}
	return nil
}

// Prove compares each guest with how it was: the same QEMU, the same state, no pause.
func (c *Component) Prove(ctx context.Context, s Scratch) error {
	defer c.Steps.Forget(c.stepName())
	var before []maint.GuestProof
	if _, err := s.Load(PhasePreflight, &before); err != nil {
		return err
	}
	guests, err := c.answer(ctx)
	if err != nil {
		return maint.Problemf(maint.CodeHypervisorDown, "libvirt", "systemctl status libvirtd virtqemud", "does not answer %s after %s: %v", c.Wait, c.Unit, err)
	}
	result := maint.PatchResult{Name: c.Unit, Guests: before}
	var seen map[string]int
	seen, result.Unwatched = c.pauses.end()
	now := c.look(guests)
	var problems []maint.Problem
	for i := range before {
		g := &result.Guests[i]
		g.Pauses = seen[g.UUID]
		if felt := differs(*g, now); felt != "" {
			g.Problem = maint.Problemf(maint.CodeGuestFelt, "guest "+g.Guest, "see its log in /var/log/libvirt/qemu, and libvirt's", "%s since %s was restarted", felt, c.Unit)
			problems = append(problems, *g.Problem)
		}
	}
	if err := c.Record(result); err != nil {
		return err
	}
	return maint.Refuse("guests felt it", problems)
}

// answer waits until libvirt tells of its guests.
func (c *Component) answer(ctx context.Context) (guests []maint.Guest, err error) {
	limit, cancel := context.WithTimeout(ctx, c.Wait)
	defer cancel()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		if guests, err = c.Guests(limit); err == nil {
			return guests, nil
		}
		select {
		case <-tick.C:
		case <-limit.Done():
			return nil, err
		}
	}
}

// differs says what is not as it was with a guest; "": all is.
func differs(was maint.GuestProof, now []maint.GuestProof) string {
	i := slices.IndexFunc(now, func(g maint.GuestProof) bool { return g.UUID == was.UUID })
	switch {
	case i < 0:
		return "it runs no more"
	case now[i].QEMU == 0 && was.QEMU != 0:
		return "its QEMU is not to be seen"
	case now[i].ID != was.ID:
		return "it was started anew"
	case now[i].QEMU != was.QEMU && was.QEMU != 0:
		return fmt.Sprintf("its QEMU is process %d, and was %d", now[i].QEMU, was.QEMU)
	case now[i].State != was.State:
		return fmt.Sprintf("it is %s, and was %s", now[i].State, was.State)
	case was.Pauses > 0:
		return fmt.Sprintf("it was paused %d times", was.Pauses)
	}
	return ""
}

// pauses counts guests' pauses.
type pauses struct {
	cancel func()
	done   chan struct{}
	mu     sync.Mutex
	counts map[string]int
	missed bool
}

func newPauses(subscribe func() (<-chan maint.Event, func())) *pauses {
	events, cancel := subscribe()
	p := &pauses{cancel: cancel, done: make(chan struct{}), counts: make(map[string]int)}
	go func() {
		defer close(p.done)
		for e := range events {
			p.mu.Lock()
			p.missed = p.missed || e.Kind == maint.EventDown
			if e.Kind == maint.EventLifecycle && e.Change == "suspended" {
				p.counts[e.UUID]++
			}
			p.mu.Unlock()
		}
	}()
	return p
}

// end gives what was counted, and whether some may have been missed. nil is of a belayd that
// has died.
func (p *pauses) end() (counts map[string]int, missed bool) {
	if p == nil {
		return nil, true
	}
	p.cancel()
	<-p.done
	return p.counts, p.missed
}
