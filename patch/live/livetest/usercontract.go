package livetest

import (
	"context"
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/patch/live"
)

// UserSubject is what patches programs, and programs that the contract is tried on.
type UserSubject struct {
	UserSpace live.UserSpace
	// QEMU takes Fits; Stock takes none.
	QEMU, Stock live.QEMU
	// Other is for a build of a library that QEMU has not mapped, Foreign is signed by
	// somebody who is not trusted.
	Fits, Other, Foreign live.Artifact
	// Effect reports whether QEMU runs the code of Fits; nil: nobody can tell.
	Effect func() bool
	// End ends QEMU.
	End func()
}

// UserContract is what package live relies on of what patches programs. It ends QEMU.
func UserContract(t *testing.T, s UserSubject) {
	ctx := t.Context()
	u, q := s.UserSpace, s.QEMU
	state := func(when string, want bool) {
		t.Helper()
		on, err := u.Applied(ctx, q, s.Fits)
		check(t, err)
		if on != want {
			t.Errorf("%s: it is applied: %t", when, on)
		}
		if s.Effect != nil && s.Effect() != want {
			t.Errorf("%s: its code is run: %t", when, !want)
		}
	}
	refuses := func(what string, err error, want maint.Code) {
		t.Helper()
		if p := new(maint.Problem); !errors.As(err, &p) || p.Code != want || live.Unsure(err) {
			t.Errorf("%s gives %v, want a problem with code %s", what, err, want)
		}
	}
	set := func(on bool) {
		t.Helper()
		stopped, err := u.Set(ctx, q, s.Fits, on)
		check(t, err)
		if stopped <= 0 {
			t.Error("it is not told for how long the process was stopped")
		}
		t.Logf("set to %t: stopped for at most %s", on, stopped)
	}

	check(t, u.Patchable(ctx, q, s.Fits))
	refuses("a QEMU without libpulp", u.Patchable(ctx, s.Stock, s.Fits), maint.CodeNeedsPause)
	refuses("a livepatch for another library", u.Patchable(ctx, q, s.Other), maint.CodeNeedsPause)
	refuses("a livepatch of somebody else's", u.Patchable(ctx, q, s.Foreign), maint.CodePatchSigned)
	_, err := u.Set(ctx, q, s.Foreign, true)
	refuses("to apply a livepatch of somebody else's", err, maint.CodePatchSigned)
	cut := s.Fits
	cut.Module = cut.Module[:len(cut.Module)-1]
	refuses("a livepatch that is cut short", u.Patchable(ctx, q, cut), maint.CodePatchFile)

	state("before", false)
	_, err = u.Set(ctx, q, s.Fits, false)
	refuses("to take back what is not applied", err, maint.CodeQEMURefused)
	set(true)
	state("applied", true)
	_, err = u.Set(ctx, q, s.Fits, true)
	refuses("to apply what is applied", err, maint.CodeQEMURefused)
	state("still applied", true)
	set(false)
	state("taken back", false)
	set(true)
	state("applied again", true)
	set(false)

	gone := func(what string, q live.QEMU) {
		t.Helper()
		on, err := u.Applied(ctx, q, s.Fits)
		_, err2 := u.Set(ctx, q, s.Fits, true)
		for _, err := range []error{err, err2, u.Patchable(ctx, q, s.Fits)} {
			if on || !errors.Is(err, unix.ESRCH) {
				t.Errorf("of %s it is said: %v", what, err)
			}
		}
	}
	another := q
	another.Start++
	gone("another process of that number", another)
	another = q
	another.Guest = s.Stock.Guest
	gone("another guest's process", another)
	s.End()
	gone("a process that has ended", q)

	over, cancel := context.WithCancel(ctx)
	cancel()
	if err := u.Patchable(over, q, s.Fits); err == nil {
		t.Error("an asker whose time is over is told that it is patchable")
	}
}
