package hypervisortest

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"belay/agent/maint"
)

// Site is a host under the contract: the Hypervisor that is tested, and the
// test's own means. A method that cannot do its work fails t.
type Site interface {
	// Hypervisor is connected to the host's libvirt, and its Run runs.
	Hypervisor() Hypervisor
	// URI is the destination URI of migrations to this host.
	URI() string
	// NewGuest starts a persistent guest that keeps writing to its memory.
	NewGuest(t testing.TB, name string) (uuid string)
	// NewAgentGuest starts one whose agent is connected, or comes to be.
	NewAgentGuest(t testing.TB, name string) (uuid string)
	// NewLeasedGuest starts one that holds the lease of a disk of its own.
	// TakeLease has somebody else take that while the guest is paused.
	NewLeasedGuest(t testing.TB, name string) (uuid string)
	TakeLease(t testing.TB, uuid string)
	FreeLease(t testing.TB, uuid string)
	// SendAway pauses a guest and has its QEMU send it somewhere, past libvirt.
	SendAway(t testing.TB, uuid string)
	// NewDiskGuest starts one that writes to vda, a raw image at a path that is the host's
	// own; WriteFile and ReadFile are for such paths. What is not there reads as nil.
	NewDiskGuest(t testing.TB, name string) (uuid, path string)
	WriteFile(t testing.TB, path string, text []byte)
	ReadFile(t testing.TB, path string) []byte
	// NewFile is the path of a file, not there yet, that libvirt can write.
	NewFile(t testing.TB) (path string)
	// StartGuest, PauseGuest, ResumeGuest and DestroyGuest do as virsh's
	// start, suspend, resume and destroy.
	StartGuest(t testing.TB, uuid string)
	PauseGuest(t testing.TB, uuid string)
	ResumeGuest(t testing.TB, uuid string)
	DestroyGuest(t testing.TB, uuid string)
	// RemoveGuest destroys and undefines the guest if it is there.
	RemoveGuest(t testing.TB, uuid string)
	// PutNetwork defines a libvirt network, and has it be active or not;
	// RemoveNetwork takes it away. The others are for storage pools and secrets.
	PutNetwork(t testing.TB, name string, active bool)
	RemoveNetwork(t testing.TB, name string)
	PutPool(t testing.TB, name string, active bool)
	RemovePool(t testing.TB, name string)
	PutSecret(t testing.TB, uuid, usage string)
	RemoveSecret(t testing.TB, uuid string)
	// KillQEMU kills the guest's QEMU on this host.
	KillQEMU(t testing.TB, uuid string)
	// Hold sees to it that a migration away from here with BandwidthMiBs 1
	// does not end before Release.
	Hold(t testing.TB)
	Release(t testing.TB, uuid string)
	// BreakPostCopy has both QEMUs of a migration in post-copy lose each other.
	BreakPostCopy(t testing.TB, uuid string)
	// KillLibvirt, RestartLibvirt: SIGKILL, and a new start.
	KillLibvirt(t testing.TB)
	RestartLibvirt(t testing.TB)
	// FreezeLibvirt, ThawLibvirt: SIGSTOP and SIGCONT.
	FreezeLibvirt(t testing.TB)
	ThawLibvirt(t testing.TB)
}

// Env is two hosts between which guests can be moved. HardCPU is a <cpu> element
// that B cannot run.
type Env struct {
	A, B    Site
	HardCPU string
}

// Contract tests that the hosts of env behave as a Hypervisor must. Its tests
// leave libvirt running and no guest behind.
func Contract(t *testing.T, env Env) {
	for _, c := range []struct {
		name string
		test func(*testing.T, Env)
	}{
		{"Info", testInfo},
		{"Supplies", testSupplies},
		{"Inventory", testInventory},
		{"UnknownGuest", testUnknownGuest},
		{"Definitions", testDefinitions},
		{"XML", testXML},
		{"CompareCPU", testCompareCPU},
		{"Events", testEvents},
		{"CPUTimes", testCPUTimes},
		{"DryRun", testDryRun},
		{"Move", testMove},
		{"MoveTransient", testMoveTransient},
		{"MoveWith", testMoveWith},
		{"MovePaused", testMovePaused},
		{"MoveNowhere", testMoveNowhere},
		{"MoveNameTaken", testMoveNameTaken},
		{"MoveWithDisk", testMoveWithDisk},
		{"MidCopyTuned", testMidCopyTuned},
		{"MidCopyAbort", testMidCopyAbort},
		{"MidCopySuspended", testMidCopySuspended},
		{"MidCopyCallerLeaves", testMidCopyCallerLeaves},
		{"MidCopyDestinationQEMUKilled", testMidCopyDestinationQEMUKilled},
		{"MidCopyDestinationLibvirtKilled", testMidCopyDestinationLibvirtKilled},
		{"MidCopySourceLibvirtKilled", testMidCopySourceLibvirtKilled},
		{"MidCopyPostCopy", testMidCopyPostCopy},
		{"MidCopyPostCopyBroken", testMidCopyPostCopyBroken},
		{"MidCopyNoPostCopy", testMidCopyNoPostCopy},
		{"Hold", testHold},
		{"HoldWithoutLibvirt", testHoldWithoutLibvirt},
		{"Lease", testLease},
		{"Clock", testClock},
		{"NoAgent", testNoAgent},
		{"QMP", testQMP},
		{"QuitMigrated", testQuitMigrated},
		{"CreatePaused", testCreatePaused},
		{"SaveRestore", testSaveRestore},
		{"Reconnect", testReconnect},
		{"Frozen", testFrozen},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, env) })
	}
}

// patience bounds every wait of the contract.
const patience = time.Minute

// newGuest starts a guest on A that is gone from both hosts after the test.
func newGuest(t *testing.T, env Env, name string) (uuid string) {
	t.Helper()
	uuid = env.A.NewGuest(t, name)
	t.Cleanup(func() {
		env.A.RemoveGuest(t, uuid)
		env.B.RemoveGuest(t, uuid)
	})
	return uuid
}

// look reads a guest.
func look(t *testing.T, s Site, nameOrUUID string) maint.Guest {
	t.Helper()
	g, err := s.Hypervisor().Guest(t.Context(), nameOrUUID)
	if err != nil {
		t.Fatalf("Guest(%s): %v", nameOrUUID, err)
	}
	return g
}

// wantState checks a guest's state and reason.
func wantState(t *testing.T, s Site, uuid string, state maint.GuestState, reason string) {
	t.Helper()
	if g := look(t, s, uuid); g.State != state || g.Reason != reason {
		t.Errorf("guest is %s (%s), want %s (%s)", g.State, g.Reason, state, reason)
	}
}

// wantGone checks that a host does not have a guest, or comes to not have it:
// libvirt may clean up after its call has returned.
func wantGone(t *testing.T, s Site, uuid string) {
	t.Helper()
	eventually(t, "guest gone", func() bool {
		_, err := s.Hypervisor().Guest(t.Context(), uuid)
		if err != nil && !errors.Is(err, maint.ErrNoGuest) {
			t.Fatal(err)
		}
		return err != nil
	})
}

// wantNoJob checks that a guest has no job, or comes to have none.
func wantNoJob(t *testing.T, s Site, uuid string) {
	t.Helper()
	eventually(t, "no job", func() bool {
		job, err := s.Hypervisor().Job(t.Context(), uuid)
		if err != nil {
			t.Fatal(err)
		}
		return !job.Active && job.State == "none" && job.Operation == "" && look(t, s, uuid).Job == ""
	})
}

// must fails the test on an error.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wantIs checks that err wraps target.
func wantIs(t *testing.T, what string, err, target error) {
	t.Helper()
	if !errors.Is(err, target) {
		t.Errorf("%s: error %v, want one that wraps %q", what, err, target)
	}
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", patience, what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// watcher collects the lifecycle events of one guest from both hosts.
type watcher struct {
	events chan sighting
}

type sighting struct {
	time time.Time
	what string // "a started migrated"
}

// watch subscribes to both hosts and takes the resync that comes first.
func watch(t *testing.T, env Env, uuid string) *watcher {
	t.Helper()
	w := &watcher{events: make(chan sighting, 100)}
	for name, site := range map[string]Site{"a": env.A, "b": env.B} {
		events := subscribe(t, site)
		go func() {
			for ev := range events {
				if ev.Kind == maint.EventLifecycle && ev.UUID == uuid {
					w.events <- sighting{ev.Time, name + " " + ev.Change + " " + ev.Detail}
				}
			}
		}()
	}
	return w
}

// want waits until all these events have come, and checks that they came in
// this order, others among them aside. The hosts' events reach us by different
// ways, so it is their times that tell the order.
func (w *watcher) want(t *testing.T, want ...string) {
	t.Helper()
	var seen []sighting
	missing := slices.Clone(want)
	timeout := time.After(patience)
	for len(missing) > 0 {
		select {
		case s := <-w.events:
			seen = append(seen, s)
			if i := slices.Index(missing, s.what); i >= 0 {
				missing = slices.Delete(missing, i, i+1)
			}
		case <-timeout:
			t.Fatalf("events %v, missing %q", seen, missing)
		}
	}
	slices.SortStableFunc(seen, func(a, b sighting) int { return a.time.Compare(b.time) })
	next := 0
	for _, s := range seen {
		if next < len(want) && s.what == want[next] {
			next++
		}
	}
	if next < len(want) {
		t.Errorf("events %v: want %q in this order", seen, want)
	}
	t.Logf("events %v", seen)
}

func (s sighting) String() string { return s.what }

// subscribe subscribes to a host for the test and checks that a resync comes
// first.
func subscribe(t *testing.T, s Site) <-chan maint.Event {
	t.Helper()
	events, cancel := s.Hypervisor().Subscribe()
	t.Cleanup(cancel)
	wantKind(t, events, maint.EventResync)
	return events
}

// wantKind waits for an event of that kind, past lifecycle events.
func wantKind(t *testing.T, events <-chan maint.Event, kind maint.EventKind) {
	t.Helper()
	timeout := time.After(patience)
	for {
		select {
		case ev, ok := <-events:
			switch {
			case !ok:
				t.Fatalf("event channel closed, want %s", kind)
			case ev.Time.IsZero():
				t.Fatalf("event without time: %+v", ev)
			case ev.Kind == kind:
				return
			case ev.Kind == maint.EventResync, ev.Kind == maint.EventDown:
				t.Fatalf("event %s, want %s", ev.Kind, kind)
			}
		case <-timeout:
			t.Fatalf("no event %s", kind)
		}
	}
}

// move is a Migrate call in progress.
type move struct {
	cancel context.CancelFunc
	result chan error
}

// startMove begins a migration from A to B that is held, and waits until both
// hosts know of it.
func startMove(t *testing.T, env Env, uuid string) *move {
	t.Helper()
	return startMoveWith(t, env, uuid, maint.MoveParams{})
}

// startMoveWith is startMove with more.
func startMoveWith(t *testing.T, env Env, uuid string, p maint.MoveParams) *move {
	t.Helper()
	p.DestURI, p.Persist, p.BandwidthMiBs = env.B.URI(), true, 1
	env.A.Hold(t)
	ctx, cancel := context.WithCancel(t.Context())
	m := &move{cancel: cancel, result: make(chan error, 1)}
	t.Cleanup(cancel)
	go func() {
		m.result <- env.A.Hypervisor().Migrate(ctx, uuid, p)
	}()
	eventually(t, "migration is copying", func() bool {
		job, err := env.A.Hypervisor().Job(t.Context(), uuid)
		must(t, err)
		_, err = env.B.Hypervisor().Guest(t.Context(), uuid)
		return job.Active && job.MemorySent > 0 && err == nil
	})
	return m
}

// wait gives Migrate's result.
func (m *move) wait(t *testing.T) error {
	t.Helper()
	select {
	case err := <-m.result:
		return err
	case <-time.After(patience):
		t.Fatal("Migrate does not return")
		return nil
	}
}
