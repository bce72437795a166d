package agent_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"belay/agent/agenttest"
	"belay/agent/config"
	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
)

// fleet is guests on the first of some hosts, by name.
type fleet struct {
	*agenttest.World
	t     *testing.T
	a     *agenttest.Node
	uuids map[string]string
}

func newFleet(t *testing.T, guests int, edit func(*config.Config), hosts ...string) *fleet {
	t.Helper()
	f := &fleet{World: agenttest.New(t, quiet(t), edit, hosts...), t: t, uuids: make(map[string]string)}
	f.a = f.Nodes[0]
	for i := range guests {
		name := fmt.Sprintf("web-%d", i+1)
		f.uuids[name] = f.a.Host.PutGuest(name, func(g *maint.Guest) {
			g.MemoryBytes, g.Autostart = uint64(64+i)<<20, true
		})
	}
	return f
}

// at is where each guest runs and is defined, "b c" for one that is in two places.
func (f *fleet) at() map[string]string {
	f.t.Helper()
	all := make(map[string]string)
	for name, uuid := range f.uuids {
		running, defined := places(f.t, f.World, uuid)
		all[name] = running
		if defined != running+"+autostart" {
			all[name] += " but defined on " + defined
		}
	}
	return all
}

// count is how many guests are at each place.
func (f *fleet) count() map[string]int {
	n := make(map[string]int)
	for _, place := range f.at() {
		n[place]++
	}
	return n
}

func (f *fleet) drain(r maint.DrainRequest) maint.Op {
	f.t.Helper()
	ctx := ctxFor(f.t, time.Minute)
	op, err := f.a.Client.Drain(ctx, r)
	if err != nil {
		f.t.Fatal(err)
	}
	return await(f.t, ctx, f.a, op.ID)
}

func (f *fleet) restore(r maint.RestoreRequest) maint.Op {
	f.t.Helper()
	ctx := ctxFor(f.t, time.Minute)
	op, err := f.a.Client.Restore(ctx, r)
	if err != nil {
		f.t.Fatal(err)
	}
	return await(f.t, ctx, f.a, op.ID)
}

func (f *fleet) cordoned() *maint.Cordon {
	f.t.Helper()
	s, err := f.a.Client.Status(ctxFor(f.t, patience))
	if err != nil {
		f.t.Fatal(err)
	}
	return s.Cordon
}

func (f *fleet) ops(n *agenttest.Node) []maint.Op {
	f.t.Helper()
	ops, err := n.Client.Ops(ctxFor(f.t, patience))
	if err != nil {
		f.t.Fatal(err)
	}
	return ops
}

func states(op maint.Op) (all []string) {
	for _, m := range op.Moves {
		all = append(all, m.Guest+" "+string(m.State))
	}
	return all
}

// TestDrainAndRestore: eight guests go, no more at once than may, none twice; the host
// stays cordoned; and they come back.
func TestDrainAndRestore(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 8, func(c *config.Config) { c.Limits.MigrationsOut, c.Limits.MigrationsIn = 3, 2 }, "a", "b", "c")
	most := f.watchCaps()
	op := f.drain(maint.DrainRequest{Reason: "firmware"})
	if op.Outcome != maint.OutcomeDone || len(op.Moves) != 8 || op.Moves[0].Guest != "web-8" {
		t.Fatalf("%s: %v, %v", op.Outcome, op.Problems, states(op))
	}
	if n := f.count(); n["b"]+n["c"] != 8 || n["b"] == 0 || n["c"] == 0 {
		t.Fatalf("guests are at %v", f.at())
	}
	if c := f.cordoned(); c == nil || c.By != "drain:"+string(op.ID) || c.Reason != "firmware" {
		t.Errorf("cordon: %+v", c)
	}
	if out, in := most(); out > 3 || in > 2 || out < 2 {
		t.Errorf("%d went at once, of 3; %d to one peer, of 2", out, in)
	}
	ops := f.ops(f.a)
	if len(ops) != 9 {
		t.Errorf("%d operations", len(ops))
	}
	for _, child := range ops[1:] {
		if child.Part != op.ID || child.By != "drain:"+string(op.ID) || child.Reason != "firmware" {
			t.Errorf("%+v", child)
		}
	}

	back := f.restore(maint.RestoreRequest{})
	if back.Outcome != maint.OutcomeDone || len(back.Moves) != 8 || back.Moves[7].Guest != "web-8" || f.count()["a"] != 8 {
		t.Fatalf("%s: %v, %v, %v", back.Outcome, back.Problems, states(back), f.at())
	}
	if f.cordoned() != nil {
		t.Error("the host is still cordoned")
	}
	for _, n := range f.Nodes[1:] {
		for _, child := range f.ops(n) {
			if child.By != "peer:a" || child.Return == nil || child.Outcome != maint.OutcomeDone {
				t.Errorf("%s has %+v", n.Host.Name(), child)
			}
		}
	}
	// It is done: once more there is nothing to bring back.
	again := f.restore(maint.RestoreRequest{Drain: op.ID})
	if again.Outcome != maint.OutcomeBlocked || again.Problems[0].Code != maint.CodeNothing {
		t.Errorf("%s: %v", again.Outcome, again.Problems)
	}
}

// watchCaps looks at every copy's beginning how many run.
func (f *fleet) watchCaps() (most func() (out, in int)) {
	type sums struct{ out, in int }
	seen := make(chan sums, 1)
	seen <- sums{}
	running := make(map[string]string)
	f.OnPhase(func(uuid string, p hypervisortest.Phase) {
		s := <-seen
		defer func() { seen <- s }()
		switch p {
		case hypervisortest.PhaseCopying:
			running[uuid] = "?"
			for _, n := range f.Nodes[1:] {
				if g, err := n.Host.Guest(context.Background(), uuid); err == nil && g.Job != "" {
					running[uuid] = n.Host.Name()
				}
			}
			n := make(map[string]int)
			for _, at := range running {
				n[at]++
			}
			s.out, s.in = max(s.out, len(running)), max(s.in, n["b"], n["c"])
		case hypervisortest.PhaseStopped:
			delete(running, uuid)
		}
	})
	return func() (int, int) { s := <-seen; seen <- s; return s.out, s.in }
}

// TestDrainRefused: what cannot be moved is named before anything is begun, with what
// can be done instead; with Partial the others go.
func TestDrainRefused(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 3, nil, "a", "b", "c")
	f.a.Host.PutDevice(t, f.uuids["web-2"], "<hostdev mode='subsystem' type='pci'><source><address domain='0' bus='3' slot='0' function='0'/></source></hostdev>")
	ctx := ctxFor(t, patience)
	plan, err := f.a.Client.PlanDrain(ctx, maint.DrainRequest{})
	if err != nil {
		t.Fatal(err)
	}
	left := maint.Left(plan.Guests)
	if len(plan.Guests) != 3 || len(left) != 1 || left[0].Guest != "web-2" || plan.Guests[2].Guest != "web-2" || plan.AtOnce != 4 {
		t.Fatalf("plan %+v", plan)
	}
	if len(left[0].Problems) != 1 || len(left[0].Instead) == 0 || !strings.Contains(left[0].Instead[0], "belay hold --guest web-2") {
		t.Errorf("left: %+v", left[0])
	}
	op := f.drain(maint.DrainRequest{})
	if op.Outcome != maint.OutcomeBlocked || len(op.Problems) != 1 || op.Problems[0].Code != maint.CodeHostDevice || !strings.Contains(op.Problems[0].Remedy, "--partial") {
		t.Fatalf("%s: %+v", op.Outcome, op.Problems)
	}
	if f.cordoned() != nil || f.count()["a"] != 3 || len(f.ops(f.a)) != 1 {
		t.Fatalf("something was begun: %v", f.at())
	}
	op = f.drain(maint.DrainRequest{Partial: true})
	if at := f.at(); op.Outcome != maint.OutcomePartly || len(op.Problems) != 1 || op.Problems[0].Subject != "guest web-2" || at["web-2"] != "a" || f.count()["a"] != 1 {
		t.Fatalf("%s: %+v, %v", op.Outcome, op.Problems, at)
	}
	if f.cordoned() == nil {
		t.Error("the host is not cordoned")
	}
	told := func() (n int) {
		s, err := f.a.Client.Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range s.Conditions {
			if strings.Contains(c.Text, string(op.ID)) {
				n++
			}
		}
		return n
	}
	if told() != 1 {
		t.Error("status does not tell of who is left")
	}
	f.a.Host.RemoveDevices(t, f.uuids["web-2"])
	mig, err := f.a.Client.Migrate(ctx, maint.MigrateRequest{Guest: "web-2", To: "c"})
	if err != nil {
		t.Fatal(err)
	}
	if mig = await(t, ctx, f.a, mig.ID); mig.Outcome != maint.OutcomeDone || told() != 0 {
		t.Errorf("%s; status still tells of who was left", mig.Outcome)
	}
}

// holding has copies not end, and returns when n have begun.
func (f *fleet) holding(n int) (begun func()) {
	f.a.Host.HoldCopies()
	copying := make(chan string, 64)
	f.OnPhase(func(uuid string, p hypervisortest.Phase) {
		if p == hypervisortest.PhaseCopying {
			copying <- uuid
		}
	})
	return func() {
		f.t.Helper()
		for range n {
			select {
			case <-copying:
			case <-time.After(patience):
				f.t.Fatal("no copy has begun")
			}
		}
	}
}

// TestDrainNotices guests that start, and that stop, in its middle.
func TestDrainNotices(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 3, func(c *config.Config) { c.Limits.MigrationsOut = 1 }, "a", "b")
	off := f.a.Host.PutGuest("late", func(g *maint.Guest) { g.State, g.Autostart = maint.GuestShutoff, true })
	begun := f.holding(1)
	ctx := ctxFor(t, patience)
	op, err := f.a.Client.Drain(ctx, maint.DrainRequest{})
	if err != nil {
		t.Fatal(err)
	}
	begun() // web-3, the largest
	f.a.Host.Start(t, off)
	f.uuids["late"] = off
	f.a.Host.Stop(t, f.uuids["web-1"], "shutdown")
	f.a.Host.ReleaseCopies()
	op = await(t, ctx, f.a, op.ID)
	at := f.at()
	if op.Outcome != maint.OutcomeDone || at["late"] != "b" || at["web-2"] != "b" || at["web-3"] != "b" || !strings.HasPrefix(at["web-1"], " but defined on a") {
		t.Fatalf("%s: %v, %v, %v", op.Outcome, op.Problems, at, states(op))
	}
}

// TestDrainKeepsGroupsApart: by metadata and by configuration, also from guests that
// are there already.
func TestDrainKeepsGroupsApart(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 4, func(c *config.Config) { c.AntiAffinity = map[string][]string{"front": {"web-1", "web-2"}} }, "a", "b", "c")
	f.a.Host.Edit(t, f.uuids["web-3"], func(g *maint.Guest) { g.AntiAffinity = []string{"db"} })
	f.Nodes[1].Host.PutGuest("db-9", func(g *maint.Guest) { g.AntiAffinity = []string{"db"} })
	op := f.drain(maint.DrainRequest{})
	at := f.at()
	if op.Outcome != maint.OutcomeDone || at["web-1"] == at["web-2"] || at["web-3"] != "c" || f.count()["a"] != 0 {
		t.Fatalf("%s: %v, %v", op.Outcome, op.Problems, at)
	}
	// Those that were on one host come back to it, but for one whose place somebody else
	// has taken.
	f.a.Host.PutGuest("db-8", func(g *maint.Guest) { g.AntiAffinity = []string{"db"} })
	back := f.restore(maint.RestoreRequest{})
	at = f.at()
	if back.Outcome != maint.OutcomePartly || at["web-1"] != "a" || at["web-2"] != "a" || at["web-3"] != "c" || len(back.Problems) != 1 || back.Problems[0].Code != maint.CodeAntiAffinity {
		t.Fatalf("%s: %v, %v", back.Outcome, back.Problems, at)
	}
	// A peer refuses it by itself, too.
	f.Nodes[1].Host.PutGuest("web-5", func(g *maint.Guest) { g.AntiAffinity = []string{"front"} })
	f.Nodes[2].Host.PutGuest("web-6", func(g *maint.Guest) { g.AntiAffinity = []string{"front"} })
	third := f.a.Host.PutGuest("web-4b", func(g *maint.Guest) { g.AntiAffinity = []string{"front"} })
	vs, err := f.a.Client.Moves(ctxFor(t, patience), third, "")
	if err != nil || len(vs) != 2 || !slices.Equal(codesOf(vs[0]), []maint.Code{maint.CodeAntiAffinity}) || !slices.Equal(codesOf(vs[1]), []maint.Code{maint.CodeAntiAffinity}) {
		t.Errorf("%+v, %v", vs, err)
	}
}

// TestDrainTellsGuests: each guest has its own notice, side by side, and moves when it
// has approved.
func TestDrainTellsGuests(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 4, func(c *config.Config) {
		c.Limits.MigrationsOut, c.Limits.MigrationsIn = 2, 1
		c.Events = config.Events{Enabled: true, Policy: "all"}
	}, "a", "b", "c")
	most := f.watchCaps()
	ctx := ctxFor(t, patience)
	op, err := f.a.Client.Drain(ctx, maint.DrainRequest{})
	if err != nil {
		t.Fatal(err)
	}
	all := errors.New("all are told")
	var events []maint.ScheduledEvent
	if err := f.a.Client.WatchEvents(ctx, false, func(es []maint.ScheduledEvent) error {
		if events = es; len(es) == 4 {
			return all
		}
		return nil
	}); !errors.Is(err, all) {
		t.Fatal(err)
	}
	if n := f.count(); n["a"] != 4 {
		t.Fatalf("moved without notice: %v", f.at())
	}
	for _, e := range events {
		if _, err := f.a.Client.ApproveEvent(ctx, e.ID, ""); err != nil {
			t.Fatal(err)
		}
	}
	op = await(t, ctx, f.a, op.ID)
	if out, in := most(); op.Outcome != maint.OutcomeDone || f.count()["a"] != 0 || out > 2 || in > 1 {
		t.Fatalf("%s: %v, %v; at once %d, to one peer %d", op.Outcome, op.Problems, f.at(), out, in)
	}
	for _, m := range op.Moves {
		if m.Tries > 0 {
			t.Errorf("had its notice for nothing: %+v", m)
		}
	}
}

// TestRestoreLeaves what has moved on, is off or is gone.
func TestRestoreLeaves(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 4, nil, "a", "b", "c")
	if op := f.drain(maint.DrainRequest{To: []string{"b"}}); op.Outcome != maint.OutcomeDone || f.count()["b"] != 4 {
		t.Fatalf("%s: %v", op.Outcome, op.Problems)
	}
	b, ctx := f.Nodes[1], ctxFor(t, patience)
	on, err := b.Client.Migrate(ctx, maint.MigrateRequest{Guest: "web-1", To: "c"})
	if err != nil {
		t.Fatal(err)
	}
	await(t, ctx, b, on.ID)
	b.Host.Stop(t, f.uuids["web-2"], "shutdown")
	b.Host.Remove(t, f.uuids["web-3"])
	op := f.restore(maint.RestoreRequest{})
	if op.Outcome != maint.OutcomeDone {
		t.Fatalf("%s: %v", op.Outcome, op.Problems)
	}
	want := map[string]maint.Code{"web-1": maint.CodeUnknownGuest, "web-2": maint.CodeGuestOff, "web-3": maint.CodeUnknownGuest, "web-4": ""}
	for _, m := range op.Moves {
		switch code := want[m.Guest]; {
		case code == "" && m.State != maint.MoveMoved, code != "" && (m.State != maint.MoveLeft || m.Problems[0].Code != code):
			t.Errorf("%+v", m)
		}
	}
	if at := f.at(); at["web-4"] != "a" || at["web-1"] != "c" {
		t.Errorf("guests are at %v", at)
	}
}

// TestRestoreRefused: a guest that its peer does not give back is not taken for one that
// is back, though it runs where it was sent.
func TestRestoreRefused(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 2, nil, "a", "b", "c")
	if op := f.drain(maint.DrainRequest{To: []string{"b"}}); op.Outcome != maint.OutcomeDone {
		t.Fatalf("%s: %v", op.Outcome, op.Problems)
	}
	ctx := ctxFor(t, patience)
	for _, way := range [][2]int{{1, 2}, {2, 1}} { // on, and back: it has not come to b from a
		from, to := f.Nodes[way[0]], f.Nodes[way[1]]
		op, err := from.Client.Migrate(ctx, maint.MigrateRequest{Guest: "web-1", To: to.Host.Name()})
		if err != nil {
			t.Fatal(err)
		}
		await(t, ctx, from, op.ID)
	}
	op := f.restore(maint.RestoreRequest{})
	if at := f.at(); op.Outcome != maint.OutcomePartly || len(op.Problems) != 1 || op.Problems[0].Subject != "guest web-1" ||
		op.Problems[0].Code != maint.CodeForbidden || at["web-1"] != "b" || at["web-2"] != "a" {
		t.Fatalf("%s: %+v, %v", op.Outcome, op.Problems, at)
	}
}

// TestReturnIsForGuestsThatCame: nobody is sent a guest that did not come from there,
// or by another operation, or that has left since; and one token is one migration.
func TestReturnIsForGuestsThatCame(t *testing.T) {
	t.Parallel()
	f := newFleet(t, 2, nil, "a", "b", "c")
	ctx := ctxFor(t, patience)
	op := f.drain(maint.DrainRequest{To: []string{"b"}})
	if err := f.a.Client.Uncordon(ctx); err != nil {
		t.Fatal(err)
	}
	own := f.Nodes[1].Host.PutGuest("b-1")
	a, c := peerOf(t, f.Nodes[1], "a"), peerOf(t, f.Nodes[1], "c")
	arrived, uuid := op.Moves[0].Op, op.Moves[0].GuestUUID
	token := strings.Repeat("t", 20)
	for name, ask := range map[string]func() error{
		"of another host": func() error {
			_, err := c.Return(ctx, maint.ReturnRequest{Token: token, GuestUUID: uuid, Arrived: arrived})
			return err
		},
		"by another operation": func() error {
			_, err := a.Return(ctx, maint.ReturnRequest{Token: token, GuestUUID: uuid, Arrived: op.Moves[1].Op})
			return err
		},
		"b's own": func() error {
			_, err := a.Return(ctx, maint.ReturnRequest{Token: token, GuestUUID: own, Arrived: arrived})
			return err
		},
	} {
		var refusal *maint.Refusal
		if err := ask(); !errors.As(err, &refusal) || refusal.Problems[0].Code != maint.CodeForbidden {
			t.Errorf("a guest %s: %v", name, err)
		}
	}
	first, err := a.Return(ctx, maint.ReturnRequest{Token: token, GuestUUID: uuid, Arrived: arrived})
	if err != nil {
		t.Fatal(err)
	}
	second, err := a.Return(ctx, maint.ReturnRequest{Token: token, GuestUUID: uuid, Arrived: arrived})
	if err != nil || second.ID != first.ID {
		t.Errorf("a second migration: %s, %v", second.ID, err)
	}
	if _, err := c.WatchReturn(ctx, first.ID, func(maint.Op) { t.Error("c is told") }); err == nil {
		t.Error("c may watch a's")
	}
	if err := c.AbortReturn(ctx, first.ID); err == nil {
		t.Error("c may abort a's")
	}
	if end, err := a.WatchReturn(ctx, first.ID, func(maint.Op) {}); err != nil || end.Outcome != maint.OutcomeDone {
		t.Fatalf("%s, %v", end.Outcome, err)
	}
	if _, err := a.Return(ctx, maint.ReturnRequest{Token: token + "2", GuestUUID: uuid, Arrived: arrived}); err == nil {
		t.Error("it has left, and is sent again")
	}
}

// A guest with a disk that is not shared stays, unless the drain copies disks along; the plan
// says so, whatever the configuration does.
func TestDrainCopiesDisks(t *testing.T) {
	t.Parallel()
	for _, byDefault := range []string{maint.CopyNone, maint.CopyAll} {
		t.Run(byDefault, func(t *testing.T) {
			t.Parallel()
			w := agenttest.New(t, quiet(t), func(c *config.Config) { c.Migration.CopyDisks = byDefault }, "a", "b")
			a := w.Nodes[0]
			uuid := withDisk(t, w)
			ctx := ctxFor(t, patience)

			plan, err := a.Client.PlanDrain(ctx, maint.DrainRequest{CopyDisks: maint.CopyNone})
			check(t, err)
			if m := plan.Guests[0]; m.State != maint.MoveLeft || len(m.Copies) != 1 || !slices.Contains(m.Instead, "have its disks copied along: belay drain --copy-disks") {
				t.Errorf("without disks it is planned as %+v", m)
			}
			plan, err = a.Client.PlanDrain(ctx, maint.DrainRequest{CopyDisks: maint.CopyAll})
			check(t, err)
			if m := plan.Guests[0]; m.State != maint.MovePlanned || m.Peer != "b" || len(m.Copies) != 1 || m.Copies[0].Path != diskPath {
				t.Errorf("with disks it is planned as %+v", m)
			}
			var p *maint.Problem
			if _, err := a.Client.PlanDrain(ctx, maint.DrainRequest{CopyDisks: "vda"}); !errors.As(err, &p) || p.Code != maint.CodeBadRequest {
				t.Errorf("a disk's name gives %v", err)
			}

			r := maint.DrainRequest{CopyDisks: maint.CopyNone}
			op, err := a.Client.Drain(ctx, r)
			check(t, err)
			if op = await(t, ctx, a, op.ID); op.Outcome != maint.OutcomeBlocked {
				t.Errorf("without disks: %s, %v", op.Outcome, op.Problems)
			}
			r.CopyDisks = ""
			if byDefault == maint.CopyNone {
				r.CopyDisks = maint.CopyAll
			}
			op, err = a.Client.Drain(ctx, r)
			check(t, err)
			if op = await(t, ctx, a, op.ID); op.Outcome != maint.OutcomeDone {
				t.Errorf("with disks: %s, %v, %v", op.Outcome, op.Problems, op.Moves)
			}
			aloneOn(t, w, uuid, "b")
			if got := w.Nodes[1].Host.ReadFile(t, diskPath); string(got) != string(image) {
				t.Error("its disk has not come whole")
			}
		})
	}
}
