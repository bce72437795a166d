package agent_test

import (
	"maps"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"belay/agent/agenttest"
	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
)

// laddering counts libvirt's calls, on all hosts, by host and name, in which it is said which
// rungs there are for a guest, "" for all.
func laddering(t *testing.T, w *agenttest.World, on *agenttest.Node) func(guest string) (maint.LadderView, map[string]int) {
	var mu sync.Mutex
	calls := make(map[string]int)
	w.OnCall(func(c hypervisortest.Call) {
		mu.Lock()
		defer mu.Unlock()
		if !c.Done {
			calls[c.Host+" "+c.Op]++
		}
	})
	return func(guest string) (maint.LadderView, map[string]int) {
		t.Helper()
		mu.Lock()
		clear(calls)
		mu.Unlock()
		v, err := on.Client.Ladder(t.Context(), guest)
		check(t, err)
		mu.Lock()
		defer mu.Unlock()
		return v, maps.Clone(calls)
	}
}

// sameOf sees that what is said of one guest is what is said of it among all.
func sameOf(t *testing.T, all, one maint.LadderView, i int) {
	t.Helper()
	if diff := cmp.Diff(all.Guests[i:i+1], one.Guests); diff != "" || len(one.Off) > 0 {
		t.Errorf("off: %v; %s", one.Off, diff)
	}
}

// TestLadderOfOneGuest: no other guest is asked for it, nor a peer about another.
func TestLadderOfOneGuest(t *testing.T) {
	t.Parallel()
	const guests = 12
	f := newFleet(t, guests, nil, "a", "b")
	ladder := laddering(t, f.World, f.a)
	all, of := ladder("")
	one, n := ladder("web-1")
	for i, g := range all.Guests {
		if g.Guest == "web-1" {
			sameOf(t, all, one, i)
		}
	}
	for _, call := range []string{"a GuestXML", "b Guests"} {
		if of[call] < guests || n[call] > of[call]/guests+3 {
			t.Errorf("%s is called %d times for one, and %d times for all %d", call, n[call], of[call], guests)
		}
	}
}

// TestLadderOfOneGuestAndKernel: what another has against a kernel is not taken for the host's, and
// what one has that is off still is.
func TestLadderOfOneGuestAndKernel(t *testing.T) {
	t.Parallel()
	b := newKexecBed(t, nil)
	b.Host.PutGuest("gpu-1", func(g *maint.Guest) {
		g.Devices = append(g.Devices, maint.Device{Kind: "hostdev", Type: "pci", Source: "0000:3b:00.0"})
	})
	b.Host.Stop(t, b.Host.PutGuest("off-1"), "shutdown")
	ladder := laddering(t, b.w, b.Node)
	all, _ := ladder("")
	for i, g := range all.Guests {
		one, _ := ladder(g.UUID)
		sameOf(t, all, one, i)
	}
	if off, _ := ladder("off-1"); len(off.Guests) > 0 || len(off.Off) != 1 || len(all.Off) != 1 {
		t.Errorf("%+v, among all %v", off, all.Off)
	}
}
