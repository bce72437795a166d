package vmm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"belay/agent/maint"
)

// swapped is what Swap writes down when the guest runs in its new QEMU.
type swapped struct {
	Pause  time.Duration `json:"pause_ns"`
	Starts int           `json:"starts"`
	Phases string        `json:"phases,omitempty"` // "" when belayd was killed within the pause
}

func (r *Replacement) swapped(pl plan, starts int, t *timing) swapped {
	if !t.began.IsZero() {
		return swapped{t.ended.Sub(t.began), starts, t.String()}
	}
	// The guard has the times by the wall clock.
	g := r.Places.guard(pl.UUID)
	w := swapped{Starts: starts}
	if from, to := g.stamped(guardPaused), g.stamped(guardResumed); !from.IsZero() && to.After(from) {
		w.Pause = to.Sub(from)
	}
	return w
}

// Prove makes sure that the guest runs in its new QEMU: its vCPUs advance, and
// it is kept as it was before. A guest that its owner has paused or shut down
// since is none of Prove's business, and noted.
func (r *Replacement) Prove(ctx context.Context, s Scratch) error {
	pl, err := r.load(s)
	if err != nil {
		return err
	}
	now, err := r.settled(ctx, pl)
	switch {
	case err != nil:
		return err
	case now == atOff:
		return s.Note("the guest is off by now, which is not Belay's doing")
	case now != atNew:
		return maint.Problemf(maint.CodeUnverified, "guest "+r.Guest, "virsh domstate --reason "+maint.ShellWord(r.Guest), "should run in its new QEMU, and is %s", now)
	}
	if err := r.advances(ctx, pl, s); err != nil {
		return err
	}
	d, err := r.Host.Describe(ctx, pl.UUID)
	if err != nil {
		return err
	}
	if d.Inactive != pl.Inactive && !pl.Adopted {
		return maint.Problemf(maint.CodeDefinition, "guest "+r.Guest, "compare it with what you want (virsh dumpxml --inactive "+maint.ShellWord(r.Guest)+")",
			"runs in its new QEMU, and its definition is not what it was when the operation began: somebody has changed it")
	}
	return nil
}

// advances waits until a vCPU has used processor time.
func (r *Replacement) advances(ctx context.Context, pl plan, s Scratch) error {
	limit, cancel := context.WithTimeout(ctx, r.paced().prove)
	defer cancel()
	first, have, step := uint64(0), false, 2*time.Millisecond
	var last error
	for {
		used, err := r.cpuTime(ctx, pl)
		switch {
		case err != nil:
			last = err
		case have && used > first:
			return nil
		case !have:
			first, have = used, true
			last = errors.New("its vCPUs use no processor time")
		}
		if state, reason, err := r.Host.State(ctx, pl.UUID); err == nil && state == maint.GuestPaused {
			return s.Note("the guest is paused (%s) by now, which is not Belay's doing", reason)
		}
		if !wait(limit, step) {
			return maint.Problemf(maint.CodeUnverified, "guest "+r.Guest, "look at its console; its memory is whole", "was resumed in its new QEMU, and gives no sign of life: %v", last)
		}
		step = min(2*step, 250*time.Millisecond)
	}
}

// cpuTime is what the vCPUs' threads have used, in ns (QMP query-cpus-fast,
// /proc/pid/task/tid/schedstat).
func (r *Replacement) cpuTime(ctx context.Context, pl plan) (sum uint64, err error) {
	var cpus []struct {
		Thread int `json:"thread-id"`
	}
	if err := ask(ctx, r.Host, pl.UUID, "query-cpus-fast", nil, &cpus); err != nil {
		return 0, err
	}
	proc, err := r.Places.qemu(pl.Guest)
	if err != nil {
		return 0, err
	}
	for _, c := range cpus {
		b, err := os.ReadFile(r.Places.at("/proc", strconv.Itoa(proc.PID), "task", strconv.Itoa(c.Thread), "schedstat"))
		if err != nil {
			return 0, err
		}
		f := strings.Fields(string(b))
		if len(f) == 0 {
			return 0, fmt.Errorf("cannot read the processor time of thread %d", c.Thread)
		}
		n, err := strconv.ParseUint(f[0], 10, 64)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

// Finish gives up what was kept, and leaves the new QEMU as any other: a
// migration by libvirt must take the guest's memory along.
func (r *Replacement) Finish(ctx context.Context, s Scratch) error {
	pl, err := r.load(s)
	if err != nil {
		return err
	}
	now, err := r.settled(ctx, pl)
	if err != nil {
		return err
	}
	if now == atNew && pl.Method == maint.VMMInPlace {
		if err := r.mover().Settle(ctx, pl.Seat); err != nil {
			return pl.LeftBehind(err)
		}
	}
	return r.drop(pl)
}

// Measure is what the replacement did, once Swap has returned.
func (r *Replacement) Measure(ctx context.Context, s Scratch) (maint.VMMResult, error) {
	res := maint.VMMResult{Guest: r.Guest, UUID: r.UUID, Method: r.Method}
	pl, err := r.load(s)
	if err != nil {
		return res, err
	}
	var w swapped
	if ok, err := s.Load(PhaseSwap, &w); err != nil || !ok {
		return res, err
	}
	res.Method, res.Choices, res.OldQEMU = pl.Method, pl.Choices, pl.OldQEMU
	res.Pause, res.Pauses, res.Attempts = w.Pause, 1, w.Starts
	res.NewQEMU, err = version(ctx, r.Host, r.UUID)
	return res, err
}

// absent reports whether libvirt has no such guest any more.
func absent(err error) bool { return errors.Is(err, maint.ErrNoGuest) }
