package guestclock_test

import (
	"context"
	"fmt"
	"os"
	"sort"
	"sync"
	"testing"
	"time"

	"belay/hypervisor"
	"belay/vmtests/guest"
	"belay/vmtests/lab"
)

func TestExplore(t *testing.T) {
	img, accel := guest.ForTest(t)
	l := lab.ForTest(t, lab.Config{Hosts: 1, QEMU: img.QEMU})
	h := l.Hosts[0]
	n := 1
	if os.Getenv("N") != "" {
		fmt.Sscan(os.Getenv("N"), &n)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 9*time.Minute)
	defer cancel()
	hv := hypervisor.New(hypervisor.Config{Socket: h.LibvirtSocket()})
	defer hv.Close()
	var uuids []string
	begin := time.Now()
	var wg sync.WaitGroup
	sem := make(chan bool, 2)
	for i := range n {
		wg.Add(1)
		go func() {
			defer wg.Done()
			sem <- true
			defer func() { <-sem }()
			if _, err := guest.Start(ctx, h, guest.Spec{Name: fmt.Sprintf("g%d", i), Accel: accel, UUID: fmt.Sprintf("11111111-2222-3333-4444-%012d", i)}, img); err != nil {
				t.Error(err)
			}
		}()
	}
	wg.Wait()
	for i := range n {
		uuids = append(uuids, fmt.Sprintf("11111111-2222-3333-4444-%012d", i))
	}
	t.Logf("boot %v", time.Since(begin))
	u := uuids[0]
	var rtts []time.Duration
	for range 200 {
		t0 := time.Now()
		g, err := hv.GuestTime(ctx, u)
		if err != nil {
			t.Fatal(err)
		}
		rtt := time.Since(t0)
		_ = g
		rtts = append(rtts, rtt)
	}
	sort.Slice(rtts, func(i, j int) bool { return rtts[i] < rtts[j] })
	t.Logf("GuestTime rtt min %v med %v p90 %v max %v", rtts[0], rtts[100], rtts[180], rtts[199])
	c, err := guest.Dial(ctx, h, "g0")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	rtts = nil
	for range 200 {
		t0 := time.Now()
		if _, err := c.Clock(ctx); err != nil {
			t.Fatal(err)
		}
		rtts = append(rtts, time.Since(t0))
	}
	sort.Slice(rtts, func(i, j int) bool { return rtts[i] < rtts[j] })
	t.Logf("probe rtt min %v med %v p90 %v max %v", rtts[0], rtts[100], rtts[180], rtts[199])

	for i := range 8 {
		time.Sleep(time.Duration(i*130) * time.Millisecond)
		now := time.Now()
		err := hv.SetGuestTime(ctx, u, now.Add(time.Millisecond))
		t.Logf("set at .%03d: replied after %v at .%03d, %v", now.Nanosecond()/1e6, time.Since(now), time.Now().Nanosecond()/1e6, err)
		r, err := c.Clock(ctx)
		t.Logf("%+v %v", r, err)
	}
	for _, cmd := range []string{"guest-info", "guest-fsfreeze-status", "guest-get-osinfo", "guest-ping"} {
		t0 := time.Now()
		m, err := hv.AgentCommand(ctx, u, cmd, nil)
		t.Logf("%s %v: %s %v", cmd, time.Since(t0), m, err)
	}
	f, err := hv.AgentCommand(ctx, u, "guest-fsfreeze-freeze", nil)
	t.Logf("freeze: %s %v", f, err)
	for _, cmd := range []string{"guest-fsfreeze-status", "guest-info", "guest-get-time", "guest-fsfreeze-thaw", "guest-nonsense"} {
		t0 := time.Now()
		m, err := hv.AgentCommand(ctx, u, cmd, nil)
		t.Logf("%s %v: %s %v", cmd, time.Since(t0), m, err)
	}
	if n == 1 {
		return
	}
	for round := range 3 {
		var mu sync.Mutex
		var out []string
		time.Sleep(3 * time.Second)
		b := time.Now()
		for _, u := range uuids {
			wg.Add(1)
			go func() {
				defer wg.Done()
				now := time.Now()
				err := hv.SetGuestTime(ctx, u, now.Add(5*time.Millisecond))
				mu.Lock()
				out = append(out, fmt.Sprintf("sent %v replied %v %v", now.Sub(b), time.Since(b), err))
				mu.Unlock()
			}()
		}
		wg.Wait()
		t.Logf("round %d at .%03d: all %v", round, b.Nanosecond()/1e6, time.Since(b))
		for _, o := range out {
			t.Log(o)
		}
	}
}
