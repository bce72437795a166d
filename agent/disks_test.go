package agent_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/agenttest"
	"belay/agent/config"
	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
)

const diskPath = "/disks/web-1.raw"

// image is what the guest's disk has.
var image = bytes.Repeat([]byte("it is written"), 1<<10)

// withDisk gives a guest to the world's first host, with a disk that is there only, and
// the folder for it to the others.
func withDisk(t *testing.T, w *agenttest.World) (uuid string) {
	t.Helper()
	for _, n := range w.Nodes {
		n.Host.WriteFile(t, "/disks/other", nil)
	}
	w.Nodes[0].Host.WriteFile(t, diskPath, image)
	return w.Nodes[0].Host.PutGuest("web-1", func(g *maint.Guest) {
		g.Autostart = true
		g.Disks = []maint.Disk{{Target: "vda", Kind: "disk", Type: "file", Source: diskPath, Format: "raw"}}
	})
}

// folder is what there is in the folder of a node's disks.
func folder(t *testing.T, n *agenttest.Node) string {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(n.Root, "disks"))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}

// migrated moves web-1 and gives the operation as it ended.
func migrated(t *testing.T, from *agenttest.Node, r maint.MigrateRequest) maint.Op {
	t.Helper()
	ctx := ctxFor(t, 30*time.Second)
	r.Guest = "web-1"
	op, err := from.Client.Migrate(ctx, r)
	if err != nil {
		t.Fatal(err)
	}
	return await(t, ctx, from, op.ID)
}

// only checks that an operation was refused for one reason.
func only(t *testing.T, op maint.Op, code maint.Code, words ...string) {
	t.Helper()
	if op.Outcome != maint.OutcomeBlocked || len(op.Problems) != 1 || op.Problems[0].Code != code {
		t.Fatalf("%s, %v; want %s", op.Outcome, op.Problems, code)
	}
	for _, word := range words {
		if !strings.Contains(op.Problems[0].Error(), word) {
			t.Errorf("%v does not say %q", op.Problems[0], word)
		}
	}
}

func TestMigrateWithDisk(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	a, b := w.Nodes[0], w.Nodes[1]
	uuid := withDisk(t, w)

	vs, err := a.Client.Moves(ctxFor(t, 10*time.Second), "web-1", "b")
	if err != nil || len(vs) != 1 || vs[0].CanMove || len(vs[0].Problems) != 1 || len(vs[0].Copies) != 1 || vs[0].Copies[0].Bytes != uint64(len(image)) {
		t.Fatalf("%+v, %v", vs, err)
	}
	only(t, migrated(t, a, maint.MigrateRequest{To: "b"}), maint.CodeDiskMissing, "--copy-disks")
	if op := migrated(t, a, maint.MigrateRequest{To: "b", CopyDisks: []string{"vdz"}}); op.Outcome != maint.OutcomeBlocked || op.Problems[0].Code != maint.CodeDiskCopy {
		t.Errorf("%s, %v", op.Outcome, op.Problems)
	}
	if got := folder(t, b); got != "other" {
		t.Fatalf("what was refused left %q", got)
	}

	op := migrated(t, a, maint.MigrateRequest{To: "b", CopyDisks: []string{maint.CopyAll}})
	if op.Outcome != maint.OutcomeDone || len(op.Move.Disks) != 1 || op.Move.Disks[0].Path != diskPath {
		t.Fatalf("%s, %v, %+v", op.Outcome, op.Problems, op.Move)
	}
	if !bytes.Equal(b.Host.ReadFile(t, diskPath), image) || !bytes.Equal(a.Host.ReadFile(t, diskPath), image) || folder(t, b) != "other web-1.raw" {
		t.Errorf("the disk was not copied, or not left: %q on a, %q on b", folder(t, a), folder(t, b))
	}
	if running, _ := places(t, w, uuid); running != "b" {
		t.Errorf("runs on %q", running)
	}

	// The old image is in the way back, until somebody has removed it.
	only(t, migrated(t, b, maint.MigrateRequest{To: "a", CopyDisks: []string{maint.CopyAll}}), maint.CodeDiskInTheWay, "operation "+string(op.ID)+" left it", "rm "+diskPath)
	if err := os.Remove(filepath.Join(a.Root, diskPath)); err != nil {
		t.Fatal(err)
	}
	if op := migrated(t, b, maint.MigrateRequest{To: "a", CopyDisks: []string{"vda"}}); op.Outcome != maint.OutcomeDone || !bytes.Equal(a.Host.ReadFile(t, diskPath), image) {
		t.Errorf("%s, %v", op.Outcome, op.Problems)
	}
}

// A host can be told to copy always.
func TestCopyDisksByDefault(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), func(c *config.Config) { c.Migration.CopyDisks = maint.CopyAll }, "a", "b")
	withDisk(t, w)
	vs, err := w.Nodes[0].Client.Moves(ctxFor(t, 10*time.Second), "web-1", "b")
	if err != nil || len(vs) != 1 || !vs[0].CanMove || len(vs[0].Copies) != 1 {
		t.Errorf("%+v, %v", vs, err)
	}
	only(t, migrated(t, w.Nodes[0], maint.MigrateRequest{To: "b", CopyDisks: []string{maint.CopyNone}}), maint.CodeDiskMissing)
	if op := migrated(t, w.Nodes[0], maint.MigrateRequest{To: "b"}); op.Outcome != maint.OutcomeDone {
		t.Errorf("%s, %v", op.Outcome, op.Problems)
	}
}

// What is in the way of a disk is never touched.
func TestDiskInTheWay(t *testing.T) {
	t.Parallel()
	for name, put := range map[string]func(*testing.T, string){
		"a file":          func(t *testing.T, path string) { check(t, os.WriteFile(path, []byte("precious"), 0o600)) },
		"an empty file":   func(t *testing.T, path string) { check(t, os.WriteFile(path, nil, 0o600)) },
		"a folder":        func(t *testing.T, path string) { check(t, os.Mkdir(path, 0o700)) },
		"a dangling link": func(t *testing.T, path string) { check(t, os.Symlink("nowhere", path)) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := agenttest.New(t, quiet(t), nil, "a", "b")
			withDisk(t, w)
			path := filepath.Join(w.Nodes[1].Root, diskPath)
			put(t, path)
			before, err := os.Lstat(path)
			check(t, err)
			op := migrated(t, w.Nodes[0], maint.MigrateRequest{To: "b", CopyDisks: []string{maint.CopyAll}})
			only(t, op, maint.CodeDiskInTheWay, "never overwrites")
			after, err := os.Lstat(path)
			if err != nil || !os.SameFile(before, after) || after.ModTime() != before.ModTime() || after.Size() != before.Size() {
				t.Errorf("%v is %v now, %v", before, after, err)
			}
		})
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Whatever ends a copy early, nothing of it is left on the destination, and the image of
// the source is untouched.
func TestFailedCopyOfDisksLeavesNothing(t *testing.T) {
	t.Parallel()
	for name, strike := range map[string]func(*testing.T, *agenttest.World, string){
		"QEMU dies": func(t *testing.T, w *agenttest.World, uuid string) { w.Nodes[1].Host.KillQEMU(t, uuid) },
		"it is cancelled": func(t *testing.T, w *agenttest.World, uuid string) {
			if err := w.Nodes[0].Host.AbortJob(context.Background(), uuid); err != nil && !errors.Is(err, maint.ErrNoJob) {
				t.Error(err)
			}
		},
		"libvirt dies here": func(t *testing.T, w *agenttest.World, _ string) {
			w.Nodes[0].Host.KillLibvirt()
			time.AfterFunc(50*time.Millisecond, w.Nodes[0].Host.RestartLibvirt)
		},
		"libvirt dies there": func(t *testing.T, w *agenttest.World, _ string) {
			w.Nodes[1].Host.KillLibvirt()
			time.AfterFunc(50*time.Millisecond, w.Nodes[1].Host.RestartLibvirt)
		},
	} {
		for _, phase := range []hypervisortest.Phase{hypervisortest.PhaseDisks, hypervisortest.PhaseCopying, hypervisortest.PhaseSuspended} {
			t.Run(name+", "+string(phase), func(t *testing.T) {
				t.Parallel()
				w := agenttest.New(t, quiet(t), nil, "a", "b")
				uuid := withDisk(t, w)
				w.OnPhase(func(uuid string, p hypervisortest.Phase) {
					if p == phase {
						strike(t, w, uuid)
					}
				})
				op := migrated(t, w.Nodes[0], maint.MigrateRequest{To: "b", CopyDisks: []string{maint.CopyAll}})
				if op.Outcome != maint.OutcomeFailed {
					t.Errorf("%s, %v", op.Outcome, op.Problems)
				}
				if running, _ := places(t, w, uuid); running != "a" {
					t.Errorf("runs on %q", running)
				}
				if got := folder(t, w.Nodes[1]); got != "other" || !bytes.Equal(w.Nodes[0].Host.ReadFile(t, diskPath), image) {
					t.Errorf("left %q on b, %q on a", got, folder(t, w.Nodes[0]))
				}
			})
		}
	}
}

// The destination was away when the source went back: it asks by itself how it ended.
func TestDestinationAsksWhatBecameOfDisks(t *testing.T) {
	t.Parallel()
	for _, moved := range []bool{false, true} {
		w := agenttest.New(t, quiet(t), nil, "a", "b")
		a, b := w.Nodes[0], w.Nodes[1]
		uuid := withDisk(t, w)
		w.OnPhase(func(uuid string, p hypervisortest.Phase) {
			switch {
			case p == hypervisortest.PhaseDisks && !moved:
				b.Kill()
				b.Host.KillQEMU(t, uuid)
			case p == hypervisortest.PhaseResumed && moved:
				b.Kill()
			}
		})
		ctx := ctxFor(t, 2*time.Minute)
		op, err := a.Client.Migrate(ctx, maint.MigrateRequest{Guest: "web-1", To: "b", CopyDisks: []string{maint.CopyAll}, Timeout: time.Minute})
		check(t, err)
		if moved { // it is waited for, see settleGrace
			time.AfterFunc(300*time.Millisecond, b.Restart)
			op = await(t, ctx, a, op.ID)
		} else {
			op = await(t, ctx, a, op.ID)
			if got := folder(t, b); got != "other web-1.raw" {
				t.Errorf("while b was away it has %q", got)
			}
			b.Restart()
		}
		want := map[bool]string{false: "other", true: "other web-1.raw"}[moved]
		for folder(t, b) != want {
			select {
			case <-time.After(20 * time.Millisecond):
			case <-ctx.Done():
				t.Fatalf("moved %t: b has %q; %s, %v", moved, folder(t, b), op.Outcome, op.Problems)
			}
		}
		if running, _ := places(t, w, uuid); running != map[bool]string{false: "a", true: "b"}[moved] {
			t.Errorf("moved %t: runs on %q", moved, running)
		}
	}
}

// arrivalWithDisk is of guest web-2, whose disk is to be copied.
func arrivalWithDisk() maint.Arrival {
	return maint.Arrival{Op: "mig-1", Guest: "web-2", GuestUUID: strings.Repeat("1", 36), MemoryBytes: 1 << 20, DomainType: "qemu",
		Disks: []maint.DiskCopy{{Target: "vda", Path: "/disks/web-2.raw", Format: "raw", Bytes: 1 << 20}}}
}

// Nobody but the peer that holds the reservation has anything made or removed.
func TestDisksAreThePeersOwn(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	b := w.Nodes[1]
	withDisk(t, w)
	ctx := ctxFor(t, 10*time.Second)
	r := arrivalWithDisk()
	forbidden := func(what string, err error) {
		t.Helper()
		var p *maint.Problem
		if !errors.As(err, &p) || p.Code != maint.CodeForbidden {
			t.Errorf("%s: %v", what, err)
		}
	}
	forbidden("made without a reservation", b.Agent.MakeDisks(ctx, "a", r.Op))
	reserve(t, b, r)
	forbidden("made for another", b.Agent.MakeDisks(ctx, "c", r.Op))
	if got := folder(t, b); got != "other" {
		t.Fatalf("made %q", got)
	}
	check(t, b.Agent.MakeDisks(ctx, "a", r.Op))
	check(t, b.Agent.MakeDisks(ctx, "a", r.Op)) // anew
	forbidden("removed by another", b.Agent.RemoveDisks(ctx, "c", r.Op))
	if got := folder(t, b); got != "other web-2.raw" {
		t.Fatalf("made %q", got)
	}

	// Nor in a folder of the system, by whatever name, nor such a lot that the sum is small.
	b.Host.WriteFile(t, "/etc/cron.d/other", nil)
	check(t, os.Symlink("../etc/cron.d", filepath.Join(b.Root, "disks/here")))
	for path, says := range map[string]string{"/etc/cron.d/web": "takes no disks in /etc", "/disks/here/web": "takes no disks in /etc",
		"/disks/../etc/web": "is no image", "/disks/web\x1b[2J": "is no image", "disks/web": "is no image"} {
		system := r
		system.Disks = []maint.DiskCopy{{Target: "vda", Path: path, Format: "raw", Bytes: 1}}
		if ps, err := b.Agent.Check(ctx, "a", system); !strings.Contains(fmt.Sprint(ps, err), says) {
			t.Errorf("%q: %v, %v", path, ps, err)
		}
	}
	check(t, os.Remove(filepath.Join(b.Root, "disks/here")))
	many := r
	many.Disks = nil
	for i := range 256 {
		many.Disks = append(many.Disks, maint.DiskCopy{Target: fmt.Sprint("vd", i), Path: fmt.Sprint("/disks/", i), Format: "raw", Bytes: 1 << 50})
	}
	if ps, err := b.Agent.Check(ctx, "a", many); err != nil || !strings.Contains(fmt.Sprint(ps), "which take up to") {
		t.Errorf("%d disks: %v, %v", len(many.Disks), ps, err)
	}
	many.Disks[7].Bytes = 1 << 60
	if ps, err := b.Agent.Check(ctx, "a", many); !strings.Contains(fmt.Sprint(ps, err), "out of range") {
		t.Errorf("%v, %v", ps, err)
	}

	// Another guest's disk cannot be made there meanwhile.
	second := r
	second.Op, second.Guest, second.GuestUUID = "mig-2", "web-3", strings.Repeat("2", 36)
	ps, err := b.Agent.Check(ctx, "a", second)
	if err != nil || len(ps) != 1 || ps[0].Code != maint.CodeDiskInTheWay || !strings.Contains(ps[0].Reason, "operation mig-1") {
		t.Errorf("%v, %v", ps, err)
	}

	// What was put in its place is left alone.
	path := filepath.Join(b.Root, "disks/web-2.raw")
	check(t, os.Remove(path))
	check(t, os.WriteFile(path, []byte("somebody's"), 0o600))
	check(t, b.Agent.RemoveDisks(ctx, "a", r.Op))
	if text, err := os.ReadFile(path); err != nil || string(text) != "somebody's" {
		t.Errorf("%q, %v", text, err)
	}
}

// reserve has room kept for an arrival from a.
func reserve(t *testing.T, n *agenttest.Node, r maint.Arrival) {
	t.Helper()
	_, err := n.Agent.Reserve(ctxFor(t, 10*time.Second), "a", r)
	check(t, err)
}

// What others have been promised of the storage is not free for a disk.
func TestRoomForDisks(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	b := w.Nodes[1]
	withDisk(t, w)
	ctx := ctxFor(t, 10*time.Second)
	var fs unix.Statfs_t
	check(t, unix.Statfs(b.Root, &fs))
	most := fs.Bavail * uint64(fs.Bsize) * 2 / 3 // so that two of them do not fit
	arrival := func(op maint.OpID, uuid string) maint.Arrival {
		return maint.Arrival{Op: op, Guest: "guest-" + uuid, GuestUUID: strings.Repeat(uuid, 36), MemoryBytes: 1 << 20, DomainType: "qemu",
			Disks: []maint.DiskCopy{{Target: "vda", Path: "/disks/" + uuid, Format: "raw", Bytes: most}}}
	}
	reserve(t, b, arrival("mig-1", "1"))
	if ps, err := b.Agent.Check(ctx, "a", arrival("mig-2", "2")); err != nil || len(ps) != 1 || ps[0].Code != maint.CodeNoRoom {
		t.Errorf("%v, %v", ps, err)
	}
	// The same guest, whose earlier operation could not give its room up.
	if ps, err := b.Agent.Check(ctx, "a", arrival("mig-3", "1")); err != nil || len(ps) > 0 {
		t.Errorf("%v, %v", ps, err)
	}
	check(t, b.Agent.Release(ctx, "a", "mig-1"))
	if ps, err := b.Agent.Check(ctx, "a", arrival("mig-2", "2")); err != nil || len(ps) > 0 {
		t.Errorf("%v, %v", ps, err)
	}
}

// A disk that a guest of the destination has is not removed, whatever the source says.
func TestDisksInUseAreKept(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	b := w.Nodes[1]
	withDisk(t, w)
	ctx := ctxFor(t, 10*time.Second)
	r := arrivalWithDisk()
	reserve(t, b, r)
	check(t, b.Agent.MakeDisks(ctx, "a", r.Op))
	uuid := b.Host.PutGuest("web-2", func(g *maint.Guest) {
		g.Disks = []maint.Disk{{Target: "vda", Kind: "disk", Type: "file", Source: "/disks/web-2.raw", Format: "raw"}}
	})
	check(t, b.Agent.RemoveDisks(ctx, "a", r.Op))
	other := r
	other.Op, other.Guest, other.GuestUUID = "mig-2", "web-3", strings.Repeat("2", 36)
	if ps, err := b.Agent.Check(ctx, "a", other); err != nil || len(ps) != 1 || !strings.Contains(ps[0].Reason, "guest web-2 has it") {
		t.Errorf("%v, %v", ps, err)
	}
	b.Host.Remove(t, uuid)
	check(t, b.Agent.RemoveDisks(ctx, "a", r.Op)) // once kept they are not Belay's any more
	if got := folder(t, b); got != "other web-2.raw" {
		t.Errorf("%q", got)
	}
}
