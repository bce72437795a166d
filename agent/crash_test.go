package agent_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"belay/agent/agenttest"
	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
)

func ctxFor(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// quiet discards logs; -v shows them.
func quiet(t *testing.T) *slog.Logger {
	if testing.Verbose() {
		return slog.New(slog.NewTextHandler(t.Output(), nil)).With("test", t.Name())
	}
	return slog.New(slog.DiscardHandler)
}

// places says in how many places the guest runs, and where it is defined.
func places(t *testing.T, w *agenttest.World, uuid string) (running, defined string) {
	t.Helper()
	for _, n := range w.Nodes {
		g, err := n.Host.Guest(ctxFor(t, 10*time.Second), uuid)
		if err != nil {
			continue
		}
		if g.State == maint.GuestRunning {
			running += n.Host.Name()
		}
		if g.Persistent {
			defined += n.Host.Name()
			if g.Autostart {
				defined += "+autostart"
			}
		}
	}
	return running, defined
}

// killer kills a node's agent at the n-th thing it does for an operation.
type killer struct {
	mu   sync.Mutex
	node *agenttest.Node
	left int
	at   string
	off  bool // the migration is over, what follows is not of it
	dead chan struct{}
}

func (k *killer) hook(what string) {
	// The inventory's own calls come at any time and change nothing.
	if strings.HasSuffix(what, " Guests") || strings.HasSuffix(what, " Info") {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.at != "" || k.off {
		return
	}
	if k.left == 0 {
		k.at = what
		k.node.Kill()
		close(k.dead)
		return
	}
	k.left--
}

// cut fails the test unless the agent was killed: then whoever asks it for something has an
// error, which says nothing.
func (k *killer) cut(t *testing.T, err error) {
	t.Helper()
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.at == "" {
		t.Fatal(err)
	}
}

// TestKilledAnywhere kills one of the two agents at every single thing that
// it does for a migration, starts it again, and looks: the operation has
// ended, its record is true, and exactly one copy of the guest runs, defined
// where it runs.
func TestKilledAnywhere(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		victim int
		fail   bool // the destination's QEMU dies in the middle
		late   bool // the agent comes back only when libvirt is done
		disk   bool // is copied along
		paused bool // the guest, by its owner
	}{
		{"source", 0, false, false, false, false},
		{"source, back late", 0, false, true, false, false},
		{"source, failing copy", 0, true, false, false, false},
		{"destination", 1, false, false, false, false},
		{"source, with a disk", 0, false, false, true, false},
		{"source, failing copy, with a disk", 0, true, false, true, false},
		{"destination, with a disk", 1, false, false, true, false},
		{"destination, failing copy, with a disk", 1, true, false, true, false},
		{"source, of a paused guest", 0, false, false, false, true},
		{"source, failing copy, of a paused guest", 0, true, false, false, true},
		{"destination, of a paused guest", 1, false, false, false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			points := 0
			for n := 0; ; n++ {
				at := killedAt(t, c.victim, n, c.fail, c.late, c.disk, c.paused)
				if at == "" {
					break
				}
				points++
			}
			if points < 6 {
				t.Fatalf("only %d points were met", points)
			}
			t.Logf("killed at %d points", points)
		})
	}
}

func killedAt(t *testing.T, victim, n int, fail, late, disk, paused bool) (at string) {
	t.Helper()
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	source := w.Nodes[0]
	var uuid string
	r := maint.MigrateRequest{Guest: "web-1", To: "b"}
	if disk {
		uuid, r.CopyDisks = withDisk(t, w), []string{maint.CopyAll}
	} else {
		uuid = source.Host.PutGuest("web-1", func(g *maint.Guest) { g.Autostart = true })
	}
	if paused {
		source.Host.Pause(t, uuid)
	}
	k := &killer{node: w.Nodes[victim], left: n, dead: make(chan struct{})}
	w.Nodes[victim].Stop()
	w.Nodes[victim].Start(k.hook)
	if fail {
		w.OnPhase(func(uuid string, p hypervisortest.Phase) {
			if p == hypervisortest.PhaseCopying {
				w.Nodes[1].Host.KillQEMU(t, uuid)
			}
		})
	}

	ctx := ctxFor(t, patience)
	op, err := source.Client.Migrate(ctx, r)
	restarted := make(chan struct{})
	go func() {
		defer close(restarted)
		select {
		case <-k.dead:
			if late {
				time.Sleep(150 * time.Millisecond) // longer than a copy takes
			}
			w.Nodes[victim].Restart()
		case <-ctx.Done():
		}
	}()
	if err != nil { // killed while it was being admitted
		k.cut(t, err)
		<-restarted
		ops, err := source.Client.Ops(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if len(ops) == 1 {
			op = ops[0]
		}
	}
	if op.ID != "" {
		op = await(t, ctx, source, op.ID)
	}
	if op.Move != nil {
		if clock := awaitArrival(t, ctx, source, op.ID).Clock; !paused && (clock.State != maint.ClockSynchronised || clock.Shots != 1) {
			t.Errorf("killed %s (n=%d): its clock is %+v", k.at, n, clock)
		}
	}
	k.mu.Lock()
	at = k.at
	k.off = true
	k.mu.Unlock()
	if at != "" {
		<-restarted
	}

	want := map[bool]string{true: "b", false: "a"}[op.Outcome.TookEffect()]
	running, defined := places(t, w, uuid)
	if paused {
		if running != "" {
			t.Fatalf("killed %s (n=%d): a guest that was paused runs on %q", at, n, running)
		}
		map[string]*agenttest.Node{"a": w.Nodes[0], "b": w.Nodes[1]}[want].Host.Unpause(t, uuid) // it must be where the record says
		running, _ = places(t, w, uuid)
	}
	story := fmt.Sprintf("killed %s (n=%d): operation %q ended %q, problems %v; runs on %q, defined on %q", at, n, op.ID, op.Outcome, op.Problems, running, defined)
	switch {
	case running != want || defined != want+"+autostart":
		t.Fatal(story)
	case op.ID != "" && op.State != maint.OpEnded:
		t.Fatal(story)
	case op.Outcome == maint.OutcomeStuck || op.Outcome == maint.OutcomePartly:
		t.Fatal(story)
	case !fail && victim == 0 && op.ID != "" && op.Outcome != maint.OutcomeDone:
		t.Fatal(story)
	}
	if disk {
		lies := map[string]string{"a": "other", "b": "other web-1.raw"}[want]
		for folder(t, w.Nodes[1]) != lies {
			select {
			case <-time.After(5 * time.Millisecond):
			case <-ctx.Done():
				t.Fatalf("%s: of disks b has %q, want %q", story, folder(t, w.Nodes[1]), lies)
			}
		}
		on := map[string]*agenttest.Node{"a": w.Nodes[0], "b": w.Nodes[1]}[want]
		if !bytes.Equal(on.Host.ReadFile(t, diskPath), image) || !bytes.Equal(source.Host.ReadFile(t, diskPath), image) {
			t.Fatalf("%s: its disk is damaged", story)
		}
	}
	for _, node := range w.Nodes {
		node.Stop()
	}
	w.Close()
	return at
}

// awaitArrival waits until the operation tells what was done for its guest where it
// has come to.
func awaitArrival(t *testing.T, ctx context.Context, n *agenttest.Node, id maint.OpID) maint.ArrivalReport {
	t.Helper()
	for {
		op, err := n.Client.Op(ctx, id)
		if err == nil && op.Arrival != nil {
			return *op.Arrival
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("operation %s does not tell what became of its guest: %+v, %v", id, op, err)
		}
	}
}

// await follows the operation through restarts of its agent.
func await(t *testing.T, ctx context.Context, n *agenttest.Node, id maint.OpID) maint.Op {
	t.Helper()
	for {
		op, err := n.Client.Watch(ctx, id, func(maint.Op) {})
		if err == nil {
			return op
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("operation %s did not end: %v", id, err)
		}
	}
}
