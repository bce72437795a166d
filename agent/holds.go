package agent

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"belay/agent/config"
	"belay/agent/maint"
	"belay/agent/run"
	"belay/notify/board"
	"belay/patch/pending"
	"belay/patch/preserve"
	"belay/patch/vmm"
)

// Preserve is what rung B needs beside libvirt: a leash, a way to run what is
// done to the host, and the guests' clocks; the host's boot, which rung C needs; its
// kernel, of rung A; and its shutdown.
type Preserve struct {
	Boot   board.Boot // zero: the notice of events goes by the wall clock when belayd restarts
	Live   Live
	Kexec  Kexec
	Leash  preserve.Leash
	Steps  preserve.Steps
	Clocks Clocks
	// Places are where guests between two QEMUs are kept.
	Places vmm.Places
	// Twin is the second libvirt daemon; nil: there is none.
	Twin *Twin
	// Pending looks for newer packages.
	Pending pending.Host
	// Shutdown is asked to wait for operations; nil: nobody is.
	Shutdown Shutdown
}

// Clocks measures and corrects guests' clocks; see package guestclock.
type Clocks interface {
	preserve.Clocks
	// Sync steps a clock forward that is behind, however far.
	Sync(ctx context.Context, g maint.Guest) maint.ClockReport
	Measure(ctx context.Context, g maint.Guest) maint.ClockReport
}

// holdGrace is what a hold has beside the pause, for all that comes before it.
const holdGrace = time.Minute

// Hold admits a hold of guests around a host step, writes it down and starts it.
func (a *Agent) Hold(ctx context.Context, by string, r maint.HoldRequest) (maint.Op, error) {
	return a.hold(ctx, by, r, asAsked)
}

// asAsked leaves an operation as it was asked for.
func asAsked(*maint.Op) {}

// hold is Hold of an operation that edit says more of.
func (a *Agent) hold(ctx context.Context, by string, r maint.HoldRequest, edit func(*maint.Op)) (maint.Op, error) {
	const what = "cannot hold guests"
	if err := a.mayCommand(by); err != nil {
		return maint.Op{}, err
	}
	if r.MaxPause == 0 {
		r.MaxPause = a.cfg.Hold.MaxPause.Duration
	}
	if err := a.checkHold(r); err != nil {
		return maint.Op{}, err
	}
	if problems := checkShapes(r); len(problems) > 0 {
		return maint.Op{}, maint.Refuse(what, problems)
	}
	guests, err := a.hyp.Guests(ctx)
	if err != nil {
		return maint.Op{}, a.cannotAsk(what, err)
	}
	uuids, err := a.named(what, guests, &r)
	if err != nil {
		return maint.Op{}, err
	}
	now := time.Now()
	op := maint.Op{ID: newOpID("hold", now), Kind: maint.OpHold, By: by, Reason: r.Reason,
		Deadline: now.Add(holdGrace + r.MaxPause), Guests: uuids, Hold: &r}
	if r.All && !slices.ContainsFunc(a.complete(guests), func(g maint.Guest) bool { return g.State.Active() }) {
		return maint.Op{}, refuse(what, maint.Problemf(maint.CodeNothing, "host "+a.cfg.Host, "run the command itself: no guest would feel it", "runs no guest"))
	}
	if len(r.Guests) == 1 {
		op.Guest = r.Guests[0]
	}
	edit(&op)
	a.tell(&op)
	return a.submit(ctx, what, op)
}

// mayCommand refuses who may not have commands run.
func (a *Agent) mayCommand(by string) error {
	if by == "root" || strings.HasPrefix(by, byCampaign) || strings.HasPrefix(by, byApply) || a.cfg.Hold.CommandsBy == "operators" {
		return nil
	}
	return maint.Problemf(maint.CodeForbidden, "caller "+by,
		`ask root, or set hold.commands_by = "operators" in belayd's configuration`, "may not have belayd run a command, which it runs as root")
}

func (a *Agent) checkHold(r maint.HoldRequest) error {
	most := a.cfg.Hold.MaxPauseLimit.Duration
	switch {
	case r.All && len(r.Guests) > 0:
		return badRequest("guests", "name guests or ask for all, not both", "are named together with all")
	case !r.All && len(r.Guests) == 0:
		return badRequest("guests", "name guests or ask for all", "are not named")
	case r.MaxPause < config.MinPause || r.MaxPause > most:
		return badRequest("max_pause", fmt.Sprintf("choose one from %s to %s (hold.max_pause_limit)", config.MinPause, most), "%s is out of range", r.MaxPause)
	}
	return cmp.Or(checkReason(r.Reason), checkEmergency(r.Emergency), checkNames(r))
}

// holdSteps wires the phases of a hold to the runner.
func (a *Agent) holdSteps(op maint.Op) []run.Step {
	h := &preserve.Hold{Op: op.ID, Request: *op.Hold, MaxPause: op.Hold.MaxPause, Host: a.hyp,
		Leash: a.preserve.Leash, Steps: a.preserve.Steps, Clocks: a.preserve.Clocks, Log: a.log.With("op", op.ID)}
	steps := []run.Step{
		{Name: preserve.PhasePreflight,
			Do: func(ctx context.Context, s *run.Scratch) error { return h.Preflight(ctx, s) }},
		{Name: preserve.PhaseHold, Commit: true,
			Do: func(ctx context.Context, s *run.Scratch) error {
				if now, _ := a.journal.Op(op.ID); now.Held != nil { // it was over when belayd died
					h.Clear(ctx)
					return preserve.Judge(*op.Hold, *now.Held)
				}
				return h.Perform(ctx, s, func(o preserve.Outcome) error { return a.recordHold(s, o) })
			},
			Undo: func(ctx context.Context, s *run.Scratch) error {
				if now, _ := a.journal.Op(op.ID); now.Held != nil {
					h.Clear(ctx)
				} else if err := h.Recover(ctx, s, func(o preserve.Outcome) error { return a.recordHold(s, o) }); err != nil {
					return err
				}
				now, _ := a.journal.Op(op.ID)
				return afterFailure(now)
			}},
		{Name: preserve.PhaseVerify,
			Do: func(context.Context, *run.Scratch) error {
				now, _ := a.journal.Op(op.ID)
				return maint.Refuse("not all is well after the hold",
					preserve.Verify(*now.Held, now.Leash, op.Hold.MaxPause))
			}},
	}
	return a.unlessCalm(preserve.PhaseHold, a.told(op, preserve.PhaseHold, steps))
}

// afterFailure is what there is to tell of a hold that failed beside why it did.
// It is an error that a person has to see to if a guest is still held, or the host
// may be half changed.
func afterFailure(op maint.Op) error {
	if op.Held == nil {
		return nil // it was not begun
	}
	if err := cmp.Or(stillHeld(*op.Held), preserve.Undone(*op.Hold, *op.Held)); err != nil {
		return err
	}
	if beside := preserve.Verify(*op.Held, op.Leash, op.Hold.MaxPause); len(beside) > 0 {
		return &run.Beside{Problems: beside}
	}
	return nil
}

// stillHeld is an error for a guest that nobody could release yet: a person is
// to know.
func stillHeld(r maint.HoldResult) error {
	for _, g := range r.Guests {
		if g.Problem != nil && g.Problem.Code == maint.CodePaused {
			return g.Problem
		}
	}
	return nil
}

// recordHold journals how a hold went, all or nothing.
func (a *Agent) recordHold(s *run.Scratch, o preserve.Outcome) error {
	held, err := json.Marshal(o.Result)
	if err != nil {
		return err
	}
	recs := []maint.Record{{Kind: maint.RecHeld, Data: held}}
	leash, err := leashRecords(o.Leash)
	if err != nil {
		return err
	}
	if err := s.Append(append(recs, leash...)...); err != nil {
		return err
	}
	a.metrics.held(o.Result, o.Leash)
	return nil
}

func leashRecords(events []maint.LeashEvent) ([]maint.Record, error) {
	var recs []maint.Record
	for _, e := range events {
		b, err := json.Marshal(e)
		if err != nil {
			return nil, err
		}
		recs = append(recs, maint.Record{Kind: maint.RecLeash, Data: b, Text: describeLeash(e)})
	}
	return recs, nil
}

// describeLeash is an event of the leash for people.
func describeLeash(e maint.LeashEvent) string {
	text := "leash " + e.Kind
	if e.Guest != "" {
		text += " " + e.Guest
	}
	if e.Count > 1 {
		text += fmt.Sprintf(" %d times", e.Count)
	}
	if e.Way != "" {
		text += " by " + e.Way
	}
	if e.Text != "" {
		text += ": " + e.Text
	}
	return text
}
