package livetest

import (
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"belay/patch/live"
)

// Subject is a kernel that the contract is tried on: a Machine, or a real one with
// livepatches that were built for it.
type Subject struct {
	Tree   live.Tree
	Kernel live.Kernel
	// A and B are cumulative livepatches, Other is for another kernel.
	A, B, Other live.Artifact
	// Wait bounds a transition.
	Wait time.Duration
	// Hold gives a livepatch whose transition is held up until letGo is called; nil: none
	// can be had.
	Hold func() (a live.Artifact, letGo func())
}

// Contract is what package live relies on of a kernel. It leaves the kernel without a
// livepatch, as it must have been before.
func Contract(t *testing.T, s Subject) {
	ctx := t.Context()
	a, b := nameOf(t, s.A), nameOf(t, s.B)
	until := func(what string, so func() bool) {
		t.Helper()
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		end := time.After(s.Wait)
		for !so() {
			select {
			case <-tick.C:
			case <-end:
				t.Fatalf("in %s it is not so that %s", s.Wait, what)
			}
		}
	}
	whole := func(name string) func() bool {
		return func() bool {
			p, err := s.Tree.Patch(name)
			check(t, err)
			return p != nil && p.Whole()
		}
	}
	gone := func(name string) func() bool {
		return func() bool {
			p, err := s.Tree.Patch(name)
			check(t, err)
			return p == nil
		}
	}
	unloaded := func(name string) func() bool {
		return func() bool {
			err := s.Kernel.Unload(ctx, name)
			if err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EBUSY) {
				t.Fatalf("a livepatch's module that is no more of use cannot be unloaded: %v", err)
			}
			loaded, _, _ := s.Tree.Module(name)
			return !loaded
		}
	}
	refuses := func(what string, err, want error) {
		t.Helper()
		if !errors.Is(err, want) {
			t.Errorf("%s gives %v, want %v", what, err, want)
		}
	}

	if why := s.Tree.Supported(); why != "" {
		t.Fatal(why)
	}
	refuses("a livepatch for another kernel", s.Kernel.Load(ctx, s.Other), unix.ENOEXEC)

	check(t, s.Kernel.Load(ctx, s.A))
	p, err := s.Tree.Patch(a)
	check(t, err)
	if p == nil || !p.Enabled || len(p.Objects) == 0 || len(p.Objects[0].Functions) == 0 || p.SrcVersion == "" {
		t.Fatalf("right after it was loaded the kernel shows %+v", p)
	}
	until("every task runs it", whole(a))
	if loaded, _, livepatch := s.Tree.Module(a); !loaded || !livepatch {
		t.Errorf("the module is loaded: %t, and bears taint K: %t", loaded, livepatch)
	}
	refuses("to load it again", s.Kernel.Load(ctx, s.A), unix.EEXIST)
	refuses("to enable what is enabled", s.Kernel.Enable(ctx, a, true), unix.EINVAL)
	refuses("to unload what is enabled", s.Kernel.Unload(ctx, a), unix.EWOULDBLOCK)

	check(t, s.Kernel.Load(ctx, s.B))
	until("every task runs the second", whole(b))
	if !gone(a)() {
		t.Error("a livepatch that was replaced is still shown")
	}
	if loaded, _, livepatch := s.Tree.Module(a); !loaded || !livepatch {
		t.Error("the module of a livepatch that was replaced has gone by itself")
	}
	until("what was replaced can be unloaded", unloaded(a))

	check(t, s.Kernel.Enable(ctx, b, false))
	until("a livepatch that was disabled vanishes", gone(b))
	until("it can be unloaded", unloaded(b))
	refuses("to disable none", s.Kernel.Enable(ctx, b, false), unix.ENOENT)

	if s.Hold == nil {
		return
	}
	held, letGo := s.Hold()
	h := nameOf(t, held)
	check(t, s.Kernel.Load(ctx, held))
	p, err = s.Tree.Patch(h)
	check(t, err)
	if p == nil || !p.Transition {
		t.Fatalf("a transition that is held up shows %+v", p)
	}
	tasks, err := s.Tree.Tasks(nil)
	check(t, err)
	if len(tasks) == 0 {
		t.Error("nobody is seen to hold up the transition")
	}
	refuses("a second load while one is in transition", s.Kernel.Load(ctx, s.B), unix.EBUSY)
	check(t, s.Kernel.Enable(ctx, h, false)) // it is turned round, whoever holds it up
	until("a transition that was turned round comes to its end", gone(h))
	letGo()
	until("its module can be unloaded", unloaded(h))
}

func nameOf(t *testing.T, a live.Artifact) string {
	t.Helper()
	info, err := live.ReadModInfo(a.Module)
	check(t, err)
	return info.Name
}
