package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"belay/agent/maint"
)

// elsewhere is a guest of this host of which its libvirt says for the time being
// that it is off, or, as of one without a persistent definition, nothing at all:
//
//	between two QEMUs   off; its memory and state are kept
//	in the twin         runs, under the second libvirt daemon
//	on its way          an operation says that it is one or the other
type elsewhere struct {
	Guest, UUID string     // the UUID is "" where only the twin's files tell of it
	Op          maint.OpID // whose doing it is, "" when that is not known
	Open        bool       // the operation has not ended
	Where       whereabouts
}

type whereabouts string

const (
	between  whereabouts = "between two QEMUs"
	inTwin   whereabouts = "in the twin"
	onItsWay whereabouts = "on its way to a new QEMU"
)

func (e elsewhere) is(nameOrUUID string) bool {
	return nameOrUUID != "" && (nameOrUUID == e.Guest || nameOrUUID == e.UUID)
}

// of reports whether the guest is that one.
func (e elsewhere) of(g maint.Guest) bool { return e.is(g.UUID) || e.is(g.Name) }

// elsewhere finds them from files and the journal; it asks no libvirt. An error
// stands beside those that could be found.
func (a *Agent) elsewhere() (all []elsewhere, err error) {
	kept, err := a.preserve.Places.Kept()
	for _, k := range kept {
		op, _ := a.journal.Op(k.Op)
		all = append(all, elsewhere{Guest: k.Guest, UUID: k.UUID, Op: k.Op, Where: between, Open: op.ID != "" && op.State != maint.OpEnded})
	}
	if a.preserve.Twin != nil {
		names, twinErr := a.preserve.Twin.Second.Guests()
		err = errors.Join(err, twinErr)
		for _, name := range names {
			all = append(all, elsewhere{Guest: name, Where: inTwin})
		}
	}
	// The latest operation tells whose doing it is, and one that is open that
	// there is such a guest, also while it passes from one place to another.
	for _, op := range slices.Backward(a.journal.Ops()) {
		if op.Kind != maint.OpReplace {
			continue
		}
		open, found := op.State != maint.OpEnded, false
		for i := range all {
			if e := &all[i]; e.is(op.Guest) || e.is(op.GuestUUID) {
				found = true
				if open || e.Op == "" {
					e.UUID, e.Op, e.Open = op.GuestUUID, op.ID, open
				}
			}
		}
		if open && !found {
			all = append(all, elsewhere{Guest: op.Guest, UUID: op.GuestUUID, Op: op.ID, Open: true, Where: onItsWay})
		}
	}
	return all, err
}

// endsWithKernel reports whether a guest would end with this host's kernel that libvirt says is off: it runs
// in the twin, or what is kept of it is in memory that no boot leaves.
func (a *Agent) endsWithKernel(e elsewhere) bool {
	return e.Where != between || !a.view.has(e.UUID, maint.GuestRunning)
}

// findElsewhere looks for a guest. What cannot be read is for conditions to tell.
func (a *Agent) findElsewhere(g maint.Guest) (elsewhere, bool) {
	all, _ := a.elsewhere()
	if i := slices.IndexFunc(all, func(e elsewhere) bool { return e.of(g) }); i >= 0 {
		return all[i], true
	}
	return elsewhere{}, false
}

// unlessElsewhere refuses a guest that is off at home because it is elsewhere.
func (a *Agent) unlessElsewhere(what string, g maint.Guest) error {
	if g.State.Active() {
		return nil
	}
	if e, there := a.findElsewhere(g); there {
		return refuse(what, e.problem())
	}
	return nil
}

// problem says why nothing else can be done to the guest now.
func (e elsewhere) problem() *maint.Problem {
	guest := "guest " + e.Guest
	switch {
	case e.Open:
		return maint.Problemf(maint.CodeBusy, guest, fmt.Sprintf("wait for it (belay ops watch %s)", e.Op),
			"is %s: operation %s is at work on it", e.Where, e.Op)
	case e.Where == inTwin:
		return maint.Problemf(maint.CodeUnverified, guest,
			fmt.Sprintf("bring it home (belay replace-vmm %s); do not stop the twin, nor start the guest at home: it would be a second one on the same disks", maint.ShellWord(e.Guest)),
			"runs in the twin, the second libvirt daemon of this host, and no operation is bringing it home")
	}
	return maint.Problemf(maint.CodeBetween, guest,
		fmt.Sprintf("do not start it: belay replace-vmm %s goes on with what is kept; belay ops show %s tells why it has not", maint.ShellWord(e.Guest), e.Op),
		"is between two QEMUs: operation %s has ended its old one and kept its memory and state", e.Op)
}

// complete puts guests right that are elsewhere, or held: they are listed as what
// they are.
func (a *Agent) complete(guests []maint.Guest) []maint.Guest {
	all, _ := a.elsewhere()
	guests = slices.Clone(guests)
	for i := range guests {
		if op, held := a.holder(guests[i]); held {
			guests[i].Reason = "held, operation " + string(op.ID)
		}
	}
	for _, e := range all {
		i := slices.IndexFunc(guests, e.of)
		switch {
		case i < 0:
			guests = append(guests, maint.Guest{UUID: e.UUID, Name: e.Guest, Agent: maint.AgentNone, Disks: []maint.Disk{}, Devices: []maint.Device{}})
			i = len(guests) - 1
		case guests[i].State.Active():
			continue
		}
		g := &guests[i]
		g.State, g.Reason = maint.GuestPaused, string(e.Where)
		if e.Where == inTwin {
			g.State = maint.GuestRunning
		}
		if e.Op != "" {
			g.Reason += ", operation " + string(e.Op)
		}
	}
	return guests
}

// astray are the conditions of guests that are elsewhere with no operation that
// would end that.
func (a *Agent) astray(guests []maint.Guest) (cs []maint.Condition) {
	all, err := a.elsewhere()
	if err != nil {
		cs = append(cs, maint.Condition{Code: maint.CodeKept, Text: "what is kept of guests cannot all be read: " + err.Error(),
			Remedy: "look into /run/belay/vmm and /run/belay-twin"})
	}
	for _, e := range all {
		runs := slices.ContainsFunc(guests, func(g maint.Guest) bool { return e.of(g) && g.State.Active() })
		if e.Open || runs && e.Where == between {
			continue
		}
		p := e.problem()
		cs = append(cs, maint.Condition{Code: p.Code, Text: p.Subject + " " + p.Reason, Remedy: p.Remedy})
	}
	return cs
}

// checkElsewhere is the doctor's word on them.
func (a *Agent) checkElsewhere() maint.Check {
	c := maint.Check{Rung: "B", Name: "guests' places", Result: maint.CheckOK, Text: "no guest is left between two QEMUs or in the twin"}
	for _, k := range a.astray(a.view.last.Load().guests) {
		if c.Result == maint.CheckOK {
			c.Result, c.Text, c.Remedy = maint.CheckFail, k.Text, k.Remedy
			continue
		}
		c.Text += "; " + k.Text
	}
	return c
}

// bringHome has every guest brought home that is in the twin when belayd starts
// and that no operation accounts for: of a journal that was lost, or of an
// operation that was refused. It goes the way of any request, one after the
// other, and what is refused stays a condition of the host.
//
// One whose last operation a person has ended, which is how such an operation
// gets stuck, stays where it is: that was a decision.
func (a *Agent) bringHome(ctx context.Context) {
	select {
	case <-a.view.ready:
	case <-ctx.Done():
		return
	}
	all, err := a.elsewhere()
	if err != nil {
		a.log.Error("what is kept of guests cannot all be read", "err", err)
	}
	for _, e := range all {
		if e.Open {
			continue
		}
		last, _ := a.journal.Op(e.Op)
		if e.Where != inTwin || last.Outcome == maint.OutcomeStuck {
			a.log.Error("a guest needs somebody", "guest", e.Guest, "op", e.Op, "err", e.problem())
			continue
		}
		a.log.Warn("a guest is in the twin and no operation accounts for it: it is to be brought home", "guest", e.Guest)
		if !a.awaitNone(ctx, maint.OpReplace) {
			return
		}
		op, err := a.replace(ctx, "belayd", maint.ReplaceRequest{Guest: e.Guest,
			Reason: "it was in the twin when belayd started, and no operation accounted for it"}, true, asAsked)
		if errors.Is(err, errNotInTwin) {
			a.log.Info("a guest that was in the twin has come home by other means", "guest", e.Guest)
			continue
		}
		if err != nil {
			a.log.Error("a guest in the twin cannot be brought home", "guest", e.Guest, "err", err)
			continue
		}
		if err := a.Watch(ctx, op.ID, func(maint.Op) error { return nil }); err != nil {
			return
		}
	}
}

// awaitNone waits until no operation of a kind is open, but for those that wait for
// guests' notice, and reports whether ctx is still alive.
func (a *Agent) awaitNone(ctx context.Context, kind maint.OpKind) bool {
	return a.until(ctx, func() bool {
		return !slices.ContainsFunc(a.journal.Ops(), func(op maint.Op) bool {
			return op.Kind == kind && op.State != maint.OpEnded && op.Step != phaseAnnounce
		})
	}) == nil
}

// toReplace looks up a guest that is to get a new QEMU. One that an operation
// which has ended has left elsewhere is gone on with.
func (a *Agent) toReplace(ctx context.Context, what, name string) (maint.Guest, whereabouts, error) {
	g, err := a.hyp.Guest(ctx, name)
	known := err == nil
	if !known {
		if !errors.Is(err, maint.ErrNoGuest) {
			return g, "", a.cannotAsk(what, err)
		}
		g = maint.Guest{Name: name, UUID: name}
	}
	e, there := a.findElsewhere(g)
	switch {
	case !there && known:
		return g, "", nil
	case !there:
		return g, "", a.unknownGuest(what, name)
	case e.Open:
		return g, "", refuse(what, e.problem())
	case e.Where != inTwin && known:
		return g, e.Where, nil
	case e.Where != inTwin:
		return maint.Guest{UUID: e.UUID, Name: e.Guest, State: maint.GuestShutoff}, e.Where, nil
	}
	if err := a.preserve.Twin.Second.Start(ctx); err != nil {
		return g, "", fmt.Errorf("%s: %w", what, err)
	}
	if g, err = a.preserve.Twin.Away.Guest(ctx, e.Guest); err != nil {
		return g, "", fmt.Errorf("%s: it is in the twin: %w", what, err)
	}
	return g, inTwin, nil
}
