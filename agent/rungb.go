package agent

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"time"

	"belay/agent/config"
	"belay/agent/maint"
	"belay/hypervisor"
	"belay/hypervisor/guestclock"
	"belay/patch/hoststep"
	"belay/patch/leash"
	"belay/patch/leash/launch"
	"belay/patch/preserve"
	"belay/patch/vmm"
)

// clocksAtOnce is how many agents are spoken to at once: a little less than
// the hypervisor's fan has connections, which resumes need too.
const clocksAtOnce = 12

// NewPreserve is what rung B works with on a real host.
func NewPreserve(cfg config.Config, hyp *hypervisor.Host, log *slog.Logger) Preserve {
	dir := filepath.Join(cfg.RunDir, "leash")
	program := cfg.Hold.Leash
	if program == "" {
		found, err := launch.Program()
		if err != nil {
			log.Warn("no guest can be held: the leash's program is not there", "err", err)
		}
		program = found
	}
	launcher := launch.New(launch.Config{Program: program, Log: log, Args: func(op maint.OpID) []string {
		return []string{"-dir", dir, "-op", string(op), "-libvirt-socket", cfg.Libvirt.Socket,
			"-libvirt-uri", cfg.Libvirt.URI, "-libvirt-lib", cfg.Libvirt.StateDir}
	}})
	return Preserve{
		Leash:  leashes{leash.Client{Dir: dir, Launcher: launcher, Log: log}, cfg.Hold.LeashSilence.Duration},
		Steps:  steps{hoststep.New(hoststep.Config{Dir: filepath.Join(cfg.RunDir, "steps"), Systemd: hoststep.ThisSystemd(), Log: log})},
		Clocks: clocks{guestclock.New(hyp, clocksAtOnce)},
		Places: vmm.Places{Guards: filepath.Join(cfg.RunDir, "vmm"), Lib: cfg.Libvirt.StateDir},
	}
}

// clocks gives package preserve the guests' clocks in its terms.
type clocks struct{ *guestclock.Clocks }

func (c clocks) Prepare(ctx context.Context, g maint.Guest) (preserve.Clock, *maint.Problem) {
	b, problem := c.Clocks.Prepare(ctx, g)
	return baseline{c.Clocks, b}, problem
}

// baseline is one guest's clock before the pause.
type baseline struct {
	clocks *guestclock.Clocks
	before guestclock.Baseline
}

func (b baseline) Correct(ctx context.Context, resumed time.Time) maint.ClockReport {
	return b.clocks.Correct(ctx, b.before, resumed)
}

// leashes gives package preserve the leash in its terms.
type leashes struct {
	client  leash.Client
	silence time.Duration
}

func (l leashes) Arm(ctx context.Context, o preserve.Order) (preserve.Line, error) {
	order := leash.Order{Op: o.Op, MaxPause: o.MaxPause, Silence: l.silence}
	for _, m := range o.Guests {
		if m.Left == "" {
			order.Guests = append(order.Guests, leash.Guest{UUID: m.UUID, Name: m.Guest, ID: m.ID})
		}
	}
	n, err := l.client.Arm(ctx, order)
	if err != nil {
		return nil, err
	}
	return line{n}, nil
}

func (l leashes) Attach(ctx context.Context, op maint.OpID) (preserve.Line, error) {
	n, err := l.client.Attach(ctx, op)
	if errors.Is(err, leash.ErrNone) {
		// One that was killed before it had an order leaves its lock behind;
		// one that lives keeps it, and goes by itself.
		_ = leash.Discard(l.client.Dir, op)
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return line{n}, nil
}

// line is an armed leash.
type line struct{ *leash.Line }

func (l line) Mark(m preserve.Mark, uuid string) {
	switch m {
	case preserve.Paused:
		l.Paused(uuid)
	case preserve.Left:
		l.Left(uuid)
	case preserve.Released:
		l.Released(uuid)
	}
}

func (l line) Leave() []maint.LeashEvent {
	defer l.Close()
	return l.Status().Events
}

// steps gives package preserve the runner of host steps in its terms.
type steps struct{ *hoststep.Runner }

func (s steps) End(ctx context.Context, name string) (*maint.StepRun, error) {
	if err := s.Runner.End(ctx, name); err != nil {
func (l line) Marks() map[string]preserve.Mark {
	marks := make(map[string]preserve.Mark)
	for _, g := range l.Status().Guests {
		marks[g.UUID] = preserve.Mark(g.Fate) // the same words
	}
	return marks
}

		return nil, err
	}
	run, err := s.Look(ctx, name)
	if errors.Is(err, hoststep.ErrUnknown) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return &run, nil
}

func (s steps) Forget(name string) {
	// What stays is on a tmpfs, and small.
	_ = s.Runner.Forget(name)
}
