package hypervisortest

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"belay/agent/maint"
	"belay/hypervisor"
)

func testInfo(t *testing.T, env Env) {
	must(t, env.A.Hypervisor().Ping(t.Context()))
	a, err := env.A.Hypervisor().Info(t.Context())
	must(t, err)
	b, err := env.B.Hypervisor().Info(t.Context())
	must(t, err)
	if a.Name == "" || a.Name == b.Name || a.UUID == "" || a.UUID == b.UUID {
		t.Errorf("hosts are not told apart: %s %s, %s %s", a.Name, a.UUID, b.Name, b.UUID)
	}
	if a.CPUs < 1 || a.Arch == "" || a.CPUModel == "" {
		t.Errorf("processors missing: %+v", a)
	}
	if a.FreeMemoryBytes == 0 || a.FreeMemoryBytes > a.MemoryBytes || a.MemoryBytes < 256<<20 {
		t.Errorf("memory: %d bytes free of %d", a.FreeMemoryBytes, a.MemoryBytes)
	}
	for _, v := range []string{a.LibvirtVersion, a.QEMUVersion} {
		if strings.Count(v, ".") != 2 {
			t.Errorf("version %q", v)
		}
	}
	if !slices.Contains(a.DomainTypes, "qemu") {
		t.Errorf("domain types %q", a.DomainTypes)
	}
	if !slices.Contains(a.MachineTypes, "pc") || !slices.Contains(a.MachineTypes, "pc-i440fx-7.2") ||
		!slices.IsSorted(a.MachineTypes) {
		t.Errorf("machine types %q: want an alias and its canonical name, sorted", a.MachineTypes)
	}
}

func testSupplies(t *testing.T, env Env) {
	const name, uuid, usage = "belay-contract", "5b6b0a4e-7c7a-4b1e-9b7b-0f6a3c1d2e4f", "belay contract"
	supplies := func() maint.Supplies {
		t.Helper()
		s, err := env.A.Hypervisor().Supplies(t.Context())
		must(t, err)
		return s
	}
	secret := func(s maint.SecretNeed) bool { return s.UUID == uuid && s.Usage == usage }
	s := supplies()
	_, network := s.Networks[name]
	_, pool := s.Pools[name]
	if network || pool || slices.ContainsFunc(s.Secrets, secret) {
		t.Fatalf("before any are made: %+v", s)
	}
	env.A.PutSecret(t, uuid, usage)
	t.Cleanup(func() { env.A.RemoveSecret(t, uuid) })
	for i, want := range []bool{false, true} {
		env.A.PutNetwork(t, name, want)
		env.A.PutPool(t, name, want)
		if i == 0 {
			t.Cleanup(func() { env.A.RemoveNetwork(t, name); env.A.RemovePool(t, name) })
		}
		s := supplies()
		for what, all := range map[string]map[string]bool{"network": s.Networks, "pool": s.Pools} {
			if active, there := all[name]; active != want || !there {
				t.Errorf("%s: there %t, active %t; want it active: %t", what, there, active, want)
			}
		}
		if !slices.ContainsFunc(s.Secrets, secret) {
			t.Errorf("secrets %+v", s.Secrets)
		}
	}

	pools, err := env.A.Hypervisor().HugePages(t.Context())
	must(t, err)
	for _, p := range pools {
		if p.PageBytes < 64<<10 || p.PageBytes&(p.PageBytes-1) != 0 {
			t.Errorf("huge pages of %d bytes", p.PageBytes)
		}
	}
}

func testInventory(t *testing.T, env Env) {
	z := newGuest(t, env, "inventory-z")
	a := newGuest(t, env, "inventory-a")

	guests, err := env.A.Hypervisor().Guests(t.Context())
	must(t, err)
	if len(guests) != 2 || guests[0].UUID != a || guests[1].UUID != z {
		t.Fatalf("guests %+v, want inventory-a and inventory-z", guests)
	}
	g := guests[0]
	if g.Name != "inventory-a" || g.State != maint.GuestRunning || g.MemoryBytes != 64<<20 || g.VCPUs != 1 ||
		g.ID <= 0 || g.MemorySource != "" || g.MemoryShared ||
		g.DomainType != "qemu" || g.MachineType == "" || !g.Persistent || g.Autostart || g.Job != "" ||
		g.Agent != maint.AgentNone || g.Disks == nil || g.Devices == nil {
		t.Errorf("guest %+v", g)
	}
	for _, key := range []string{"inventory-a", a, strings.ReplaceAll(a, "-", "")} {
		if diff := cmp.Diff(g, look(t, env.A, key)); diff != "" {
			t.Errorf("Guest(%s) differs from Guests():\n%s", key, diff)
		}
	}

	env.A.PauseGuest(t, a)
	wantState(t, env.A, a, maint.GuestPaused, "user")
	env.A.ResumeGuest(t, a)
	wantState(t, env.A, a, maint.GuestRunning, "unpaused")
	env.A.DestroyGuest(t, a)
	wantState(t, env.A, a, maint.GuestShutoff, "destroyed")
	if g := look(t, env.A, a); !g.Persistent || g.Job != "" || g.ID != 0 {
		t.Errorf("guest shut off: %+v", g)
	}
	job, err := env.A.Hypervisor().Job(t.Context(), a)
	if err != nil || job.Active || job.State != "none" {
		t.Errorf("job of a guest that is shut off: %+v, %v", job, err)
	}
	wantIs(t, "AbortJob", env.A.Hypervisor().AbortJob(t.Context(), a), maint.ErrNoJob)
	_, err = env.A.Hypervisor().CompletedJob(t.Context(), a)
	wantIs(t, "CompletedJob", err, maint.ErrNoJob)
	env.A.StartGuest(t, a)
	wantState(t, env.A, a, maint.GuestRunning, "booted")
}

func testUnknownGuest(t *testing.T, env Env) {
	h, ctx := env.A.Hypervisor(), t.Context()
	for _, uuid := range []string{"99999999-0000-4000-8000-000000000000", "nobody"} {
		for op, call := range map[string]func() error{
			"Guest":            func() error { _, err := h.Guest(ctx, uuid); return err },
			"GuestXML":         func() error { _, err := h.GuestXML(ctx, uuid); return err },
			"Job":              func() error { _, err := h.Job(ctx, uuid); return err },
			"CompletedJob":     func() error { _, err := h.CompletedJob(ctx, uuid); return err },
			"AbortJob":         func() error { return h.AbortJob(ctx, uuid) },
			"DryRun":           func() error { return h.DryRun(ctx, uuid, maint.MoveParams{DestURI: env.B.URI()}) },
			"Migrate":          func() error { return h.Migrate(ctx, uuid, maint.MoveParams{DestURI: env.B.URI()}) },
			"SetMaxDowntime":   func() error { return h.SetMaxDowntime(ctx, uuid, time.Second) },
			"LiftBandwidth":    func() error { return h.LiftBandwidth(ctx, uuid) },
			"SetAutostart":     func() error { return h.SetAutostart(ctx, uuid, true) },
			"SetNote":          func() error { return h.SetNote(ctx, uuid, "x") },
			"SetPolicy":        func() error { return h.SetPolicy(ctx, uuid, "x") },
			"Note":             func() error { _, err := h.Note(ctx, uuid); return err },
			"UndefineInactive": func() error { return h.UndefineInactive(ctx, uuid) },
			"Launch":           func() error { return h.Launch(ctx, uuid) },
			"Suspend":          func() error { return h.Suspend(ctx, uuid) },
			"Resume":           func() error { return h.Resume(ctx, uuid) },
			"State":            func() error { _, _, err := h.State(ctx, uuid); return err },
			"GuestTime":        func() error { _, err := h.GuestTime(ctx, uuid); return err },
			"SetGuestTime":     func() error { return h.SetGuestTime(ctx, uuid, time.Now()) },
			"AgentCommand":     func() error { _, err := h.AgentCommand(ctx, uuid, "guest-ping", nil); return err },
			"QMP":              func() error { _, err := h.QMP(ctx, uuid, "query-status", nil); return err },
			"HoldOut":          func() error { _, err := h.HoldOut(ctx, uuid, 1, 2); return err },
			"HoldIn":           func() error { _, err := h.HoldIn(ctx, uuid, nil); return err },
			"Sever":            func() error { _, err := h.Sever(ctx, uuid, nil); return err },
			"QuitMigrated":     func() error { return h.QuitMigrated(ctx, uuid) },
			"Save":             func() error { return h.Save(ctx, uuid, "/nowhere") },
		} {
			err := call()
			wantIs(t, op, err, maint.ErrNoGuest)
			if _, ok := errors.AsType[*hypervisor.Error](err); !ok {
				t.Errorf("%s: %T is no *hypervisor.Error", op, err)
			}
		}
	}
}

func testDefinitions(t *testing.T, env Env) {
	h, ctx := env.A.Hypervisor(), t.Context()
	uuid := newGuest(t, env, "definitions")

	for _, on := range []bool{true, true, false} {
		must(t, h.SetAutostart(ctx, uuid, on))
		if g := look(t, env.A, uuid); g.Autostart != on {
			t.Errorf("autostart is %t after SetAutostart(%t)", g.Autostart, on)
		}
	}

	for _, text := range []string{"", `{"a":"<b>&amp;ü ]]>"}`, "another", "", ""} {
		must(t, h.SetNote(ctx, uuid, text))
		if got, err := h.Note(ctx, uuid); err != nil || got != text {
			t.Errorf("note %q, %v, not %q", got, err, text)
		}
		must(t, h.SetPolicy(ctx, uuid, "p"+text))
		if g := look(t, env.A, uuid); g.Policy != "p"+text {
			t.Errorf("policy %q, not %q", g.Policy, "p"+text)
		}
	}

	for range 2 {
		must(t, h.SetPolicy(ctx, uuid, ""))
		if g := look(t, env.A, uuid); g.Policy != "" {
			t.Errorf("policy %q, which was taken away", g.Policy)
		}
	}

	x, err := h.GuestXML(ctx, uuid)
	must(t, err)
	wantIs(t, "UndefineInactive of a running guest", h.UndefineInactive(ctx, uuid), hypervisor.ErrActive)
	must(t, h.Define(ctx, x.Inactive))
	wantState(t, env.A, uuid, maint.GuestRunning, "booted")

	env.A.DestroyGuest(t, uuid)
	for range 2 { // the second time there is nothing to do
		must(t, h.Launch(ctx, uuid))
		wantState(t, env.A, uuid, maint.GuestRunning, "booted")
	}
	env.A.DestroyGuest(t, uuid)
	must(t, h.UndefineInactive(ctx, uuid))
	wantGone(t, env.A, uuid)
	must(t, h.Define(ctx, x.Inactive))
	if g := look(t, env.A, uuid); g.State != maint.GuestShutoff || !g.Persistent || g.Name != "definitions" {
		t.Errorf("guest defined anew: %+v", g)
	}
	if err := h.Define(ctx, "<domain"); err == nil {
		t.Error("Define takes what is no XML")
	}
}

func testXML(t *testing.T, env Env) {
	uuid := newGuest(t, env, "xml")
	x, err := env.A.Hypervisor().GuestXML(t.Context(), uuid)
	must(t, err)
	for form, text := range map[string]string{"live": x.Live, "migratable": x.Migratable, "portable": x.Portable, "inactive": x.Inactive} {
		g, err := hypervisor.ParseGuest(text)
		must(t, err)
		if g.Name != "xml" || g.UUID != uuid || g.MemoryBytes != 64<<20 || g.MachineType == "" {
			t.Errorf("%s XML says %+v", form, g)
		}
	}
	if !strings.HasPrefix(x.CPU, "<cpu") || !strings.HasSuffix(x.CPU, ">") || !strings.Contains(x.Migratable, x.CPU) {
		t.Errorf("<cpu> element %q", x.CPU)
	}
}

func testCompareCPU(t *testing.T, env Env) {
	uuid := newGuest(t, env, "cpu")
	x, err := env.A.Hypervisor().GuestXML(t.Context(), uuid)
	must(t, err)
	g := look(t, env.A, uuid)
	info, err := env.A.Hypervisor().Info(t.Context())
	must(t, err)
	b := env.B.Hypervisor()
	if err := b.CompareCPU(t.Context(), g.DomainType, info.Arch, g.MachineType, x.CPU); err != nil {
		t.Errorf("a guest's CPU %s: %v", x.CPU, err)
	}
	if err := b.CompareCPU(t.Context(), g.DomainType, info.Arch, g.MachineType, ""); err != nil {
		t.Errorf("no CPU: %v", err)
	}
	err = b.CompareCPU(t.Context(), g.DomainType, info.Arch, g.MachineType, env.HardCPU)
	if e, ok := errors.AsType[*hypervisor.IncompatibleCPU](err); !ok || e.Reason == "" {
		t.Errorf("%s: error %v, want *IncompatibleCPU with a reason", env.HardCPU, err)
	}
}

func testEvents(t *testing.T, env Env) {
	uuid := newGuest(t, env, "events")
	w := watch(t, env, uuid)
	env.A.PauseGuest(t, uuid)
	env.A.ResumeGuest(t, uuid)
	env.A.DestroyGuest(t, uuid)
	env.A.StartGuest(t, uuid)
	env.A.DestroyGuest(t, uuid)
	must(t, env.A.Hypervisor().UndefineInactive(t.Context(), uuid))
	w.want(t, "a suspended paused", "a resumed unpaused", "a stopped destroyed",
		"a started booted", "a stopped destroyed", "a undefined removed")

	events, cancel := env.A.Hypervisor().Subscribe()
	cancel()
	cancel()
	for range events { // ends: the channel is closed
	}
}

func testCPUTimes(t *testing.T, env Env) {
	uuid := newGuest(t, env, "cpu-times")
	h := env.A.Hypervisor()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	type told struct {
		running bool
		at      time.Time
	}
	ready, times, ended := make(chan struct{}), make(chan told, 10), make(chan error, 1)
	go func() {
		ended <- h.CPUTimes(ctx, uuid, func() { close(ready) }, func(running bool, at time.Time) { times <- told{running, at} })
	}()
	select {
	case <-ready:
	case err := <-ended:
		t.Fatal(err)
	}
	for _, running := range []bool{false, true} {
		begun := time.Now().Truncate(time.Microsecond)
		if running {
			env.A.ResumeGuest(t, uuid)
		} else {
			env.A.PauseGuest(t, uuid)
		}
		select {
		case got := <-times:
			if got.running != running || got.at.Before(begun) || got.at.After(time.Now()) {
				t.Errorf("got %+v, want running %t, since %v", got, running, begun)
			}
		case <-ctx.Done():
			t.Fatal("nothing is told")
		}
	}
	cancel()
	must(t, <-ended)
	err := h.CPUTimes(t.Context(), "00000000-0000-4000-8000-000000000000", nil, func(bool, time.Time) {})
	wantIs(t, "CPUTimes of nobody", err, maint.ErrNoGuest)
}

func testReconnect(t *testing.T, env Env) {
	uuid := newGuest(t, env, "reconnect")
	h := env.A.Hypervisor()
	slow, fast := subscribe(t, env.A), subscribe(t, env.A)

	env.A.KillLibvirt(t)
	wantKind(t, fast, maint.EventDown)
	wantIs(t, "Ping without libvirt", h.Ping(t.Context()), maint.ErrHypervisorDown)
	_, err := h.Guest(t.Context(), uuid)
	wantIs(t, "Guest without libvirt", err, maint.ErrHypervisorDown)
	err = h.Migrate(t.Context(), uuid, maint.MoveParams{DestURI: env.B.URI()})
	wantIs(t, "Migrate without libvirt", err, maint.ErrHypervisorDown)

	env.A.RestartLibvirt(t)
	wantKind(t, fast, maint.EventResync)
	must(t, h.Ping(t.Context()))
	if g := look(t, env.A, uuid); g.State != maint.GuestRunning {
		t.Errorf("guest is %s", g.State)
	}
	env.A.PauseGuest(t, uuid)
	wantKind(t, fast, maint.EventLifecycle)

	// Who did not read meanwhile has missed nothing.
	for _, kind := range []maint.EventKind{maint.EventDown, maint.EventResync, maint.EventLifecycle} {
		wantKind(t, slow, kind)
	}
}

func testFrozen(t *testing.T, env Env) {
	h := env.A.Hypervisor()
	env.A.FreezeLibvirt(t)
	t.Cleanup(func() { env.A.ThawLibvirt(t) })
	for range 6 { // more than there are control connections
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		start := time.Now()
		err := h.Ping(ctx)
		cancel()
		wantIs(t, "Ping of a frozen libvirt", err, context.DeadlineExceeded)
		wantIs(t, "Ping of a frozen libvirt", err, maint.ErrHypervisorDown)
		if took := time.Since(start); took > time.Second {
			t.Errorf("Ping took %v with a deadline of 100 ms", took)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	_, err := h.Guests(ctx)
	wantIs(t, "a call given up", err, context.Canceled)
	if errors.Is(err, maint.ErrHypervisorDown) {
		t.Errorf("a caller's leaving is taken for libvirt's being down: %v", err)
	}

	env.A.ThawLibvirt(t)
	must(t, h.Ping(t.Context()))
	_, err = h.Guests(t.Context())
	must(t, err)
}
