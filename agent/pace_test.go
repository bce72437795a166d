package agent_test

import (
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"belay/agent/agenttest"
	"belay/agent/config"
	"belay/agent/maint"
)

// A peer that reserves without an end does not fill the journal: it is refused, and another
// peer is not. To renew a reservation over and over takes no room at all.
func TestFloodOfReservations(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b", "c")
	b := w.Nodes[1]
	var written atomic.Int64
	b.Stop()
	b.Start(func(what string) {
		if strings.HasPrefix(what, "before append reserved") {
			written.Add(1)
		}
	})
	ctx := ctxFor(t, 2*patience)
	arrival := func(n int) maint.Arrival {
		return maint.Arrival{Op: maint.OpID(fmt.Sprintf("mig-%d", n)), Guest: "web-1", GuestUUID: "10000000-0000-4000-8000-00000000beef", MemoryBytes: 1 << 20,
			VCPUs: 1, Arch: "x86_64", DomainType: "qemu", MachineType: "pc-q35-7.2", HostUUID: "00000000-0000-4000-8000-0000000000ff"}
	}
	from := peerOf(t, b, "a")
	for range 50 {
		if _, err := from.Reserve(ctx, arrival(0)); err != nil {
			t.Fatal(err)
		}
	}
	if n := written.Load(); n > 2 {
		t.Errorf("a reservation that was renewed 50 times at once is on disk %d times", n)
	}
	refused := 0
	for n := range 400 {
		if _, err := from.Reserve(ctx, arrival(n+1)); err != nil {
			if got := refusal(t, err); !slices.Equal(got, []maint.Code{maint.CodeHostBusy}) || !strings.Contains(err.Error(), "a has asked it for more than") {
				t.Fatal(err)
			}
			refused++
		}
	}
	if n := written.Load(); refused == 0 || n >= 390 {
		t.Errorf("%d of 400 reservations were refused, and %d are on disk", refused, n)
	}
	check(t, peerOf(t, b, "a").Release(ctx, "mig-1"))
	other := arrival(0)
	other.Op, other.Guest, other.GuestUUID = "mig-c", "web-2", "10000000-0000-4000-8000-00000000cafe"
	if _, err := peerOf(t, b, "c").Reserve(ctx, other); err != nil {
		t.Errorf("another peer is refused: %v", err)
	}
}

// A guest in more groups than a peer can be told of is refused before anything is begun,
// and is not sent there without them.
func TestTooManyGroups(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), func(c *config.Config) {
		c.AntiAffinity = make(map[string][]string)
		for i := range 70 {
			c.AntiAffinity[fmt.Sprintf("g%d", i)] = []string{"web-1"}
		}
	}, "a", "b")
	a := w.Nodes[0]
	uuid := a.Host.PutGuest("web-1", autostarted)
	vs, err := a.Client.Moves(ctxFor(t, patience), "web-1", "b")
	check(t, err)
	if len(vs) != 1 || vs[0].CanMove || len(vs[0].Problems) != 1 || vs[0].Problems[0].Code != maint.CodeAntiAffinity || !strings.Contains(vs[0].Problems[0].Reason, "70 groups are more than 64") {
		t.Errorf("%+v", vs)
	}
	ends(t, w, move(t, w), uuid, maint.OutcomeBlocked, maint.CodeAntiAffinity)
}
