package agent

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"belay/agent/maint"
	"belay/agent/run"
	"belay/hypervisor"
	"belay/patch/preserve"
	"belay/patch/vmm/twin"
)

// TwinArg is belayd's first argument where it is the supervisor of the twin.
const TwinArg = "twin"

// Twin is the second libvirt daemon of this host.
type Twin struct {
	Second twin.Second
	Away   Hypervisor // its libvirt
	// Leash releases guests there.
	Leash preserve.Leash
}

// newTwin is the twin of a real host. output is a file for what its supervisor
// says where systemd does not run.
func newTwin(self, output string, log *slog.Logger) (*twin.Twin, *hypervisor.Host) {
	t := &twin.Twin{Program: []string{self, TwinArg}, Launcher: twinLauncher(output)}
	away := hypervisor.New(hypervisor.Config{Socket: t.Socket(), Log: log})
	t.Libvirt = away
	return t, away
}

// ServeTwin is belayd as the twin's supervisor.
func ServeTwin(ctx context.Context, log *slog.Logger) error {
	return twin.Serve(ctx, twin.DefaultRoot, log)
}

// side gives package twin a hypervisor in its own terms.
type side struct{ Hypervisor }

func (s side) Describe(ctx context.Context, uuid string) (twin.Description, error) {
	x, err := s.GuestXML(ctx, uuid)
	return twin.Description{Portable: x.Portable, Inactive: x.Inactive}, err
}

// visit is a replacement by way of the twin.
func (a *Agent) visit(op maint.Op) *twin.Visit {
	return &twin.Visit{Op: op.ID, Guest: op.Guest, UUID: op.GuestUUID, Method: op.Replace.Method, MaxPause: op.Replace.MaxPause,
		Home: side{a.hyp}, Away: side{a.preserve.Twin.Away}, Twin: a.preserve.Twin.Second, Log: a.log.With("op", op.ID),
		Progress: func(j maint.Job) {
			a.progress.Store(op.ID, j)
			a.progressed.tell()
		}}
}

// visitChoice is what a way by the twin would cost a guest.
func (a *Agent) visitChoice(ctx context.Context, g maint.Guest, m maint.VMMMethod) (maint.VMMChoice, error) {
	return a.visit(maint.Op{Guest: g.Name, GuestUUID: g.UUID, Replace: &maint.ReplaceRequest{Method: m}}).Choice(ctx)
}

// visitSteps wires the phases of a visit to the runner.
func (a *Agent) visitSteps(op maint.Op) []run.Step {
	v := a.visit(op)
	// A way out and a way back have a leash each: where a guest is paused,
	// and by which libvirt it is to be resumed, is another each time.
	home, away := &pauseLeash{a: a, op: op, leash: a.preserve.Leash, hyp: a.hyp, suffix: homeSuffix},
		&pauseLeash{a: a, op: op, leash: a.preserve.Twin.Leash, hyp: a.preserve.Twin.Away, suffix: awaySuffix}
	v.BeforePause = func(ctx context.Context, atHome bool) error {
		if atHome {
			return home.arm(ctx)
		}
		return away.arm(ctx)
	}
	v.PointOfNoReturn = func(ctx context.Context) error { return errors.Join(home.pass(ctx), away.pass(ctx)) }
	around := func(ctx context.Context, s *run.Scratch, f func() error) error {
		return home.around(ctx, s, func() error { return away.around(ctx, s, f) })
	}
	// A guest that home refuses runs in the twin; it is tried for as long as it
	// takes, unless somebody aborts that.
	back := func(ctx context.Context, s *run.Scratch) error {
		for {
			err := around(ctx, s, func() error { return v.Back(a.life, s) })
			if !errors.Is(err, twin.ErrStuck) || errors.Is(context.Cause(ctx), run.ErrAborted) {
				return unlessAway(op, err)
			}
			if err := s.Note("the guest runs in the twin and is not brought home yet: %v", err); err != nil {
				return err
			}
			if !pause(a.life, homeAgain) {
				return a.life.Err()
			}
		}
	}
	return a.told(op, twin.PhaseOut, []run.Step{
		{Name: twin.PhasePreflight,
			Do: func(ctx context.Context, s *run.Scratch) error { return v.Preflight(ctx, s) }},
		{Name: twin.PhaseOut,
			Do: func(ctx context.Context, s *run.Scratch) error {
				return around(ctx, s, func() error { return unlessAway(op, v.Out(ctx, a.life, s)) })
			},
			Undo: func(_ context.Context, s *run.Scratch) error { return back(a.life, s) }},
		{Name: twin.PhaseBack, Commit: true,
			Do: func(ctx context.Context, s *run.Scratch) error { return back(ctx, s) }},
		{Name: twin.PhaseFinish,
			Do: func(ctx context.Context, s *run.Scratch) error {
				result, err := v.Finish(ctx, s)
				if err != nil {
					return err
				}
				result.Total = time.Since(op.Started)
				clock := a.clockAfter(ctx, op, result.Lost())
				result.Clock = &clock
				if err := s.Record(maint.RecReplaced, result); err != nil {
					return err
				}
				return a.clockLeft(ctx, op.ID)
			}},
	})
}

// The leashes of a visit are its operation's with these words after its ID.
const homeSuffix, awaySuffix = "-home", "-away"

// homeAgain is between two longer series of tries to bring a guest home.
const homeAgain = time.Minute

// unlessAway gives err, as one that ends the operation without any undo where
// the guest could not be brought home.
func unlessAway(op maint.Op, err error) error {
	if errors.Is(err, twin.ErrStuck) {
		return &run.Stuck{Problem: maint.AsProblem(err, maint.CodeUnverified, "guest "+op.Guest)}
	}
	return err
}
