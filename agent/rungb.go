package agent

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"belay/agent/boottime"
	"belay/agent/config"
	"belay/agent/logind"
	"belay/agent/maint"
	"belay/hypervisor"
	"belay/hypervisor/guestclock"
	"belay/notify/board"
	"belay/patch/hoststep"
	"belay/patch/leash"
	"belay/patch/leash/launch"
	"belay/patch/preserve"
	"belay/patch/vmm"
	"belay/patch/vmm/twin"
)

// clocksAtOnce is how many agents are spoken to at once: as many as libvirtd has
// workers (max_workers), each of which a setting keeps for up to a second.
const clocksAtOnce = 20

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
	leashFor := func(dir, socket, uri, lib string) preserve.Leash {
		launcher := launch.New(launch.Config{Program: program, Log: log, Args: func(op maint.OpID) []string {
			return []string{"-dir", dir, "-op", string(op), "-libvirt-socket", socket, "-libvirt-uri", uri, "-libvirt-lib", lib}
		}})
		return leashes{leash.Client{Dir: dir, Launcher: launcher, Log: log}, cfg.Hold}
	}
	helper := newHelper(cfg)
	p := Preserve{
		Leash:  leashFor(dir, cfg.Libvirt.Socket, cfg.Libvirt.URI, cfg.Libvirt.StateDir),
		Steps:  steps{hoststep.New(hoststep.Config{Dir: filepath.Join(cfg.RunDir, "steps"), Systemd: hoststep.ThisSystemd(), Log: log})},
		Clocks: clocks{guestclock.New(hyp, clocksAtOnce)},
		Places: vmm.Places{Lib: cfg.Libvirt.StateDir}, // the hook knows the other folders by their names
		Live:   newLive(cfg, hyp, helper),
		Kexec:  newKexec(cfg, helper),

		Shutdown: logind.Host{},
	}
	if id, err := boottime.ID(); err == nil {
		p.Boot = board.Boot{ID: id, Since: boottime.Now}
	}
	if self, err := os.Executable(); err == nil {
		second, away := newTwin(self, filepath.Join(cfg.StateDir, "twin.log"), log)
		// What holds a guest's monitor in the twin is found by libvirt there alone.
		p.Twin = &Twin{Second: second, Away: away, Leash: leashFor(dir, second.Socket(), "qemu:///system", filepath.Join(twin.DefaultRoot, "lib/qemu"))}
	}
	return p
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

func (b baseline) Correct(ctx context.Context, resumed time.Time, stood time.Duration) maint.ClockReport {
	return b.clocks.Correct(ctx, b.before, resumed, stood)
}

// leashes gives package preserve the leash in its terms.
type leashes struct {
	client leash.Client
	cfg    config.Hold
}

func (l leashes) Arm(ctx context.Context, o preserve.Order) (preserve.Line, error) {
	order := leash.Order{Op: o.Op, MaxPause: o.MaxPause, Silence: l.cfg.LeashSilence.Duration, KillLibvirt: l.cfg.KillLibvirt.Duration}
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

func (l line) Marks() map[string]preserve.Mark {
	marks := make(map[string]preserve.Mark)
	for _, g := range l.Status().Guests {
		marks[g.UUID] = preserve.Mark(g.Fate) // the same words
	}
	return marks
}

func (l line) Leave() []maint.LeashEvent {
	defer l.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if events, err := l.Events(ctx); err == nil {
		return events
	}
	s := l.Status()
	if s.Fired != "" && !slices.ContainsFunc(s.Events, func(e maint.LeashEvent) bool { return e.Kind == maint.LeashFired }) {
		s.Events = append(s.Events, maint.LeashEvent{Time: time.Now(), Kind: maint.LeashFired, Text: s.Fired})
	}
	return s.Events
}

// steps gives package preserve the runner of host steps in its terms.
type steps struct{ *hoststep.Runner }

func (s steps) End(ctx context.Context, name string) (*maint.StepRun, error) {
	if err := s.Runner.End(ctx, name); err != nil {
		return nil, err
	}
	if begun, err := s.Begun(name); err != nil || !begun {
		return nil, err
	}
	run, err := s.Look(ctx, name)
	if err != nil {
		return nil, err
	}
	return &run, nil
}

func (s steps) Forget(name string) {
	// What stays is on a tmpfs, and small.
	_ = s.Runner.Forget(name)
}
