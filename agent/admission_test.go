package agent_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"belay/agent"
	"belay/agent/agenttest"
	"belay/agent/api"
	"belay/agent/config"
	"belay/agent/journal"
	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
)

func TestSameGuestTwiceAtOnce(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	uuid := w.Nodes[0].Host.PutGuest("web-1", autostarted)
	w.Nodes[0].Host.HoldCopies()
	ctx := ctxFor(t, patience)
	const askers = 8
	var asking sync.WaitGroup
	ops, errs := make([]maint.Op, askers), make([]error, askers)
	for i := range askers {
		asking.Go(func() { ops[i], errs[i] = w.Nodes[0].Client.Migrate(ctx, toB) })
	}
	asking.Wait()
	var admitted []maint.OpID
	for i, err := range errs {
		if err == nil {
			admitted = append(admitted, ops[i].ID)
		}
	}
	if len(admitted) != 1 {
		t.Fatalf("admitted are %v", admitted)
	}
	for _, err := range errs {
		if err == nil {
			continue
		}
		if got := refusal(t, err); !slices.Equal(got, []maint.Code{maint.CodeBusy}) {
			t.Errorf("refused for %v", got)
		}
		if !strings.Contains(err.Error(), string(admitted[0])) || !strings.Contains(err.Error(), "begun by root") {
			t.Errorf("the refusal does not name the operation and who began it: %v", err)
		}
	}
	w.Nodes[0].Host.ReleaseCopies()
	ends(t, w, await(t, ctx, w.Nodes[0], admitted[0]), uuid, maint.OutcomeDone, "")
}

// copying gives a channel that has a guest's UUID when its copy has begun.
func copying(w *agenttest.World) <-chan string {
	begun := make(chan string, 16)
	w.OnPhase(func(uuid string, p hypervisortest.Phase) {
		if p == hypervisortest.PhaseCopying {
			begun <- uuid
		}
	})
	return begun
}

func TestLimits(t *testing.T) {
	t.Parallel()
	t.Run("out", func(t *testing.T) {
		t.Parallel()
		w := agenttest.New(t, quiet(t), func(c *config.Config) { c.Limits.MigrationsOut = 1 }, "a", "b")
		source := w.Nodes[0]
		uuid := source.Host.PutGuest("web-1", autostarted)
		source.Host.PutGuest("web-2")
		source.Host.HoldCopies()
		ctx := ctxFor(t, patience)
		op, err := source.Client.Migrate(ctx, toB)
		if err != nil {
			t.Fatal(err)
		}
		second := maint.MigrateRequest{Guest: "web-2", To: "b"}
		_, err = source.Client.Migrate(ctx, second)
		if got := refusal(t, err); !slices.Equal(got, []maint.Code{maint.CodeHostBusy}) {
			t.Errorf("refused for %v", got)
		}
		source.Host.ReleaseCopies()
		ends(t, w, await(t, ctx, source, op.ID), uuid, maint.OutcomeDone, "")
		if op, err = source.Client.Migrate(ctx, second); err != nil {
			t.Fatalf("there is room again: %v", err)
		}
		if op = await(t, ctx, source, op.ID); op.Outcome != maint.OutcomeDone {
			t.Errorf("%+v", op)
		}
	})
	// What fits the destination one at a time, and not both.
	for name, c := range map[string]struct {
		edit func(*config.Config)
		want maint.Code
	}{
		"in":     {func(c *config.Config) { c.Limits.MigrationsIn = 1 }, maint.CodeHostBusy},
		"memory": {func(c *config.Config) { c.Limits.GuestMemory.Bytes = 300 << 20 }, maint.CodeNoRoom},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := agenttest.New(t, quiet(t), c.edit, "a", "b")
			source := w.Nodes[0]
			uuids := map[string]string{"web-1": source.Host.PutGuest("web-1", autostarted), "web-2": source.Host.PutGuest("web-2", autostarted)}
			source.Host.HoldCopies()
			ctx := ctxFor(t, patience)
			ended := make(chan maint.Op, 2)
			for guest := range uuids {
				op, err := source.Client.Migrate(ctx, maint.MigrateRequest{Guest: guest, To: "b"})
				if err != nil {
					t.Fatal(err)
				}
				go func() {
					op, err := source.Client.Watch(ctx, op.ID, func(maint.Op) {})
					if err != nil {
						t.Error(err)
					}
					ended <- op
				}()
			}
			first := <-ended // the other one is being copied, and held
			ends(t, w, first, uuids[first.Guest], maint.OutcomeBlocked, c.want)
			source.Host.ReleaseCopies()
			second := <-ended
			ends(t, w, second, uuids[second.Guest], maint.OutcomeDone, "")
		})
	}
}

// TestStopInMidCopy: an agent that is stopped leaves the copy to libvirt, and
// takes it up again when it is back, whether or not that has ended by then.
func TestStopInMidCopy(t *testing.T) {
	t.Parallel()
	for name, during := range map[string]bool{"back in time": true, "back late": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := agenttest.New(t, quiet(t), nil, "a", "b")
			source := w.Nodes[0]
			uuid := source.Host.PutGuest("web-1", autostarted)
			source.Host.HoldCopies()
			stopped := make(chan struct{})
			begun := make(chan struct{})
			w.OnPhase(func(_ string, p hypervisortest.Phase) {
				switch p {
				case hypervisortest.PhaseCopying:
					close(begun)
				case hypervisortest.PhaseStopped:
					close(stopped)
				}
			})
			ctx := ctxFor(t, patience)
			op, err := source.Client.Migrate(ctx, toB)
			if err != nil {
				t.Fatal(err)
			}
			<-begun
			source.Stop()
			if during {
				source.Start(nil)
				source.Host.ReleaseCopies()
			} else {
				source.Host.ReleaseCopies()
				<-stopped
				source.Start(nil)
			}
			op = await(t, ctx, source, op.ID)
			ends(t, w, op, uuid, maint.OutcomeDone, "")
			if op.Resumed != 1 || op.Move.Downtime <= 0 {
				t.Errorf("resumed %d times, measured %+v", op.Resumed, op.Move)
			}
		})
	}
}

var errFull = errors.New("write: no space left on device")

func TestJournalFull(t *testing.T) {
	t.Parallel()
	t.Run("source", func(t *testing.T) {
		t.Parallel()
		w := agenttest.New(t, quiet(t), nil, "a", "b")
		source := w.Nodes[0]
		uuid := source.Host.PutGuest("web-1", autostarted)
		begun := copying(w)
		source.FailJournal(errFull)
		ctx := ctxFor(t, patience)
		_, err := source.Client.Migrate(ctx, toB)
		if got := refusal(t, err); !slices.Equal(got, []maint.Code{maint.CodeJournal}) || !strings.Contains(err.Error(), "nothing was begun") {
			t.Errorf("refused for %v: %v", got, err)
		}
		s, err := source.Client.Status(ctx)
		if err != nil || len(s.Operations) > 0 || !slices.ContainsFunc(s.Conditions, func(c maint.Condition) bool { return c.Code == maint.CodeJournal }) {
			t.Errorf("the status is %+v, %v", s, err)
		}
		if len(begun) > 0 {
			t.Error("a copy was begun that is written down nowhere")
		}
		source.FailJournal(nil)
		ends(t, w, move(t, w), uuid, maint.OutcomeDone, "")
	})
	t.Run("source, in the middle", func(t *testing.T) {
		t.Parallel()
		w := agenttest.New(t, quiet(t), nil, "a", "b")
		source := w.Nodes[0]
		uuid := source.Host.PutGuest("web-1", autostarted)
		source.Stop()
		var failed atomic.Bool
		source.Start(func(what string) {
			switch what {
			case "before append step-start verify": // the guest has moved
				if failed.CompareAndSwap(false, true) {
					source.FailJournal(errFull)
				}
			case "before append step-start perform": // it is tried again
				source.FailJournal(nil)
			}
		})
		op := move(t, w)
		if !failed.Load() {
			t.Fatal("the journal never failed")
		}
		ends(t, w, op, uuid, maint.OutcomeDone, "")
	})
	t.Run("destination", func(t *testing.T) {
		t.Parallel()
		w := agenttest.New(t, quiet(t), nil, "a", "b")
		uuid := w.Nodes[0].Host.PutGuest("web-1", autostarted)
		begun := copying(w)
		w.Nodes[1].FailJournal(errFull)
		op := move(t, w)
		ends(t, w, op, uuid, maint.OutcomeFailed, maint.CodeJournal)
		if p := op.Problems[0]; !strings.Contains(p.Reason, "nothing was begun, and the guest is on a as before") {
			t.Errorf("the record says %v", p)
		}
		if len(begun) > 0 {
			t.Error("a copy was begun without room being promised")
		}
	})
	t.Run("destination, in the middle", func(t *testing.T) {
		t.Parallel()
		w := agenttest.New(t, quiet(t), nil, "a", "b")
		uuid := w.Nodes[0].Host.PutGuest("web-1", autostarted)
		w.OnPhase(func(_ string, p hypervisortest.Phase) {
			if p == hypervisortest.PhaseCopying {
				w.Nodes[1].FailJournal(errFull)
			}
		})
		op := move(t, w)
		ends(t, w, op, uuid, maint.OutcomePartly, maint.CodeJournal)
		if p := op.Problems[0]; !strings.Contains(p.Reason, "runs on b,") || !strings.Contains(p.Remedy, "make room") {
			t.Errorf("the record says %v", p)
		}
	})
}

// peerOf is name's way to node n, as name's belayd has it.
func peerOf(t *testing.T, n *agenttest.Node, name string) *api.Client {
	t.Helper()
	id, err := api.LoadIdentity(n.CA.CertFile("ca"), n.CA.CertFile(name), n.CA.KeyFile(name))
	if err != nil {
		t.Fatal(err)
	}
	id.Client.ServerName = n.Host.Name()
	c := api.NewTLS(n.Host.Name(), n.Config.API.Listen, id.Client)
	t.Cleanup(c.Close)
	return c
}

// TestPeersKeepToTheirOwn: a peer may touch what it has reserved, and nothing
// else.
func TestPeersKeepToTheirOwn(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b", "c")
	ctx := ctxFor(t, patience)
	b := w.Nodes[1]
	mine := b.Host.PutGuest("theirs")
	other := b.Host.PutGuest("not-theirs")
	fromA, fromC := peerOf(t, b, "a"), peerOf(t, b, "c")
	arrival := maint.Arrival{Op: "mig-1", Guest: "web-1", GuestUUID: "10000000-0000-4000-8000-00000000abcd",
		MemoryBytes: 64 << 20, Arch: "x86_64", DomainType: "qemu", HostUUID: "of-a"}
	if _, err := fromA.Reserve(ctx, arrival); err != nil {
		t.Fatal(err)
	}
	otherGuest := arrival
	otherGuest.GuestUUID = "10000000-0000-4000-8000-00000000dcba"
	settlement := func(op maint.OpID, uuid string) maint.Settlement {
		return maint.Settlement{Op: op, GuestUUID: uuid, Autostart: true, Persistent: true}
	}
	for what, err := range map[string]error{
		"another peer renews it":                         errOf(fromC.Reserve(ctx, arrival)),
		"it is renewed for another guest":                errOf(fromA.Reserve(ctx, otherGuest)),
		"another peer gives it up":                       fromC.Release(ctx, "mig-1"),
		"another peer settles its guest":                 fromC.Settle(ctx, settlement("mig-1", arrival.GuestUUID)),
		"its peer settles a guest that was here before":  fromA.Settle(ctx, settlement("mig-1", other)),
		"a guest is settled without any reservation":     fromA.Settle(ctx, settlement("mig-2", mine)),
		"a guest is settled without naming an operation": fromA.Settle(ctx, settlement("", mine)),
	} {
		var p *maint.Problem
		if !errors.As(err, &p) || p.Code != maint.CodeForbidden {
			t.Errorf("%s: %v", what, err)
		}
	}
	for _, uuid := range []string{mine, other} {
		if g, err := b.Host.Guest(ctx, uuid); err != nil || g.Autostart {
			t.Errorf("a guest was changed: %+v, %v", g, err)
		}
	}
	s, err := b.Client.Status(ctx)
	if err != nil || len(s.Reservations) != 1 || s.Reservations[0].From != "a" || s.Reservations[0].GuestUUID != arrival.GuestUUID {
		t.Errorf("the reservations are %+v, %v", s.Reservations, err)
	}

	// What its own guest may become: itself alone.
	b.Host.PutGuest("web-1", func(g *maint.Guest) { g.UUID, g.Persistent = arrival.GuestUUID, false })
	wrong := settlement("mig-1", arrival.GuestUUID)
	for _, xml := range []string{"<domain><uuid>" + other + "</uuid></domain>", "<domain>", "not XML"} {
		wrong.XML = xml
		var p *maint.Problem
		if err := fromA.Settle(ctx, wrong); !errors.As(err, &p) || p.Code != maint.CodeBadRequest {
			t.Errorf("a definition %q is sent along: %v", xml, err)
		}
	}
	if err := fromA.Release(ctx, "mig-1"); err != nil {
		t.Error(err)
	}
	if err := fromA.Release(ctx, "mig-1"); err != nil {
		t.Error("a second release is a failure:", err)
	}
}

// TestBadArrivals: what a peer sends is not believed.
func TestBadArrivals(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	ctx := ctxFor(t, patience)
	fromA := peerOf(t, w.Nodes[1], "a")
	good := maint.Arrival{Op: "mig-1", Guest: "web-1", GuestUUID: "10000000-0000-4000-8000-00000000abcd", MemoryBytes: 1 << 20, DomainType: "qemu"}
	for what, edit := range map[string]func(*maint.Arrival){
		"long ID":         func(a *maint.Arrival) { a.Op = maint.OpID(strings.Repeat("x", 129)) },
		"no UUID":         func(a *maint.Arrival) { a.GuestUUID = "" },
		"no name":         func(a *maint.Arrival) { a.Guest = "" },
		"no memory":       func(a *maint.Arrival) { a.MemoryBytes = 0 },
		"too much memory": func(a *maint.Arrival) { a.MemoryBytes = 1<<64 - 1 },
		"no domain type":  func(a *maint.Arrival) { a.DomainType = "" },
	} {
		a := good
		edit(&a)
		_, check := fromA.Check(ctx, a)
		for _, err := range []error{check, errOf(fromA.Reserve(ctx, a))} {
			var p *maint.Problem
			if !errors.As(err, &p) || p.Code != maint.CodeBadRequest {
				t.Errorf("%s: %v", what, err)
			}
		}
	}
	if ps, err := fromA.Check(ctx, good); err != nil || len(ps) > 0 {
		t.Errorf("what the wrong ones are made from is refused: %v, %v", ps, err)
	}
}

// TestReservationLapses: room is kept for as long as the source is heard of.
func TestReservationLapses(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		w := hypervisortest.NewWorld()
		defer w.Close()
		j, err := journal.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer j.Close()
		cfg := config.Config{Host: "b", StateDir: dir, Limits: config.Limits{MigrationsIn: 1}, Journal: config.Journal{Keep: config.Duration{Duration: time.Hour}}}
		a := agent.New(cfg, "test", w.AddHost("b", hypervisortest.HostOptions{}), j, agent.Preserve{}, nil, quiet(t))
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { defer close(ended); _ = a.Run(ctx) }()
		defer func() { stop(); <-ended }()

		first := maint.Arrival{Op: "mig-1", Guest: "web-1", GuestUUID: "10000000-0000-4000-8000-000000000001", MemoryBytes: 1 << 20, DomainType: "qemu"}
		second := maint.Arrival{Op: "mig-2", Guest: "web-2", GuestUUID: "10000000-0000-4000-8000-000000000002", MemoryBytes: 1 << 20, DomainType: "qemu"}
		reserve := func(r maint.Arrival, want bool) {
			t.Helper()
			if _, err := a.Reserve(ctx, "a", r); (err == nil) != want {
				t.Errorf("reserving for %s: %v", r.Guest, err)
			}
		}
		reserve(first, true)
		reserve(second, false)
		time.Sleep(60 * time.Second)
		reserve(first, true) // renewed
		time.Sleep(60 * time.Second)
		reserve(second, false)
		time.Sleep(31 * time.Second) // nobody has renewed it
		reserve(second, true)
		reserve(first, false) // who comes back too late stands in line
	})
}

// errOf is the error of a reservation.
func errOf(_ maint.Landing, err error) error { return err }
