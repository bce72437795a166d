package twin

import (
	"context"
	"errors"
	"fmt"
	"time"

	"belay/agent/maint"
)

// The pauses that a planner is told to expect.
const (
	bouncePause    = 500 * time.Millisecond // libvirt's limit of 300 ms, and the hand-over
	prewarmedPause = 50 * time.Millisecond
)

// survey is what can be known beforehand of a visit.
type survey struct {
	maint.VMMChoice
	guard Guard
}

// survey asks everything that can be asked before anything is done.
func (v *Visit) survey(ctx context.Context) (b before, sv survey, err error) {
	fail := func(err error) (before, survey, error) {
		return b, sv, fmt.Errorf("cannot survey guest %s: %w", v.Guest, err)
	}
	sv.Method = v.Method
	g, err := v.Home.Guest(ctx, v.UUID)
	if err != nil {
		return fail(err)
	}
	b = before{Autostart: g.Autostart, Memory: g.MemoryBytes}
	sv.Problems = v.unfit(g)
	d, err := v.Home.Describe(ctx, v.UUID)
	if err != nil {
		return fail(err)
	}
	b.XML = d.Inactive
	need := Need{Guest: v.Guest, Portable: d.Portable, Memory: overhead, Hook: v.Method == maint.VMMPrewarmed}
	sv.Pause = prewarmedPause
	if v.Method == maint.VMMPrewarmed && g.DomainType == "kvm" {
		sv.Unproven = "under KVM it was tried on emulated hosts only, where guests have crashed after it, probably of the emulation (docs/rung-b-vmm.md)"
	}
	if v.Method != maint.VMMPrewarmed {
		need.Memory, need.Files = g.MemoryBytes+overhead, g.MemorySource == "file"
		sv.Pause = bouncePause
	}
	sv.MemoryBytes = need.Memory
	guard, problems, err := v.Twin.Fit(need)
	if err != nil {
		return fail(err)
	}
	sv.guard, sv.Problems = guard, append(sv.Problems, problems...)
	if len(sv.Problems) > 0 {
		return b, sv, nil // what follows needs a running guest, and takes time
	}
	if b.QEMU, err = version(ctx, v.Home, v.UUID); err != nil {
		return fail(err)
	}
	if v.Method == maint.VMMPrewarmed {
		_, problems, err := memoryFiles(ctx, v.Home, v.UUID, v.Guest, g.MemoryBytes)
		if err != nil {
			return fail(err)
		}
		sv.Problems = append(sv.Problems, problems...)
	}
	if err := v.Home.DryRun(ctx, v.UUID, v.Twin.Route(v.UUID, true)); err != nil {
		if errors.Is(err, maint.ErrHypervisorDown) {
			return fail(err)
		}
		sv.Problems = append(sv.Problems, *maint.Problemf(maint.CodeSourceRefuses, "guest "+v.Guest, "change what libvirt names", "libvirt refuses to migrate it: %v", err))
	}
	return b, sv, nil
}
