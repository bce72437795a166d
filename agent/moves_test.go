package agent_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"belay/agent/agenttest"
	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
	"belay/migrate/local"
)

// sharing gives all hosts of a world one storage, /srv of each, and gives its
// folder.
func sharing(t *testing.T, w *agenttest.World) string {
	t.Helper()
	shared := t.TempDir()
	for _, n := range w.Nodes {
		if err := errors.Join(os.MkdirAll(n.Root, 0o755), os.Symlink(shared, filepath.Join(n.Root, "srv"))); err != nil {
			t.Fatal(err)
		}
	}
	return shared
}

// file is a disk of a guest.
func file(path, more string) string {
	return fmt.Sprintf("<disk type='file'><source file='%s'/><target dev='vda'/>%s</disk>", path, more)
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
}

// onlyFile is that a folder has that file and nothing else: no mark is left.
func onlyFile(t *testing.T, dir, name string) {
	t.Helper()
	all, err := os.ReadDir(dir)
	if err != nil || len(all) != 1 || all[0].Name() != name {
		t.Errorf("%s has %v, %v; want %s only", dir, all, err, name)
	}
}

func codesOf(v maint.MoveVerdict) (codes []maint.Code) {
	for _, p := range v.Problems {
		codes = append(codes, p.Code)
	}
	return codes
}

// TestMoves: each guest and each peer, with every reason, and nothing is left of
// the question.
func TestMoves(t *testing.T) {
	t.Parallel()
	w := agenttest.NewOn(t, quiet(t), map[string]hypervisortest.HostOptions{"c": {CannotRun: []string{"qemu64"}}}, nil, "a", "b", "c")
	a, b, c := w.Nodes[0], w.Nodes[1], w.Nodes[2]
	shared, ctx := sharing(t, w), ctxFor(t, patience)
	put(t, filepath.Join(shared, "one.raw"), "disk")
	put(t, filepath.Join(a.Root, "own/two.raw"), "disk")
	put(t, filepath.Join(b.Root, "own/two.raw"), "disk")
	for name, xml := range map[string]string{
		"one": file("/srv/one.raw", "") + "<interface type='network'><source network='lan'/></interface>",
		"two": file("/own/two.raw", "") + "<disk type='network'><source protocol='rbd' name='x'><auth><secret uuid='s-1'/></auth></source><target dev='vdb'/></disk>",
	} {
		a.Host.PutDevice(t, a.Host.PutGuest(name), xml)
	}
	b.Host.PutNetwork("lan", true)
	b.Host.PutSecret("s-1", "")
	c.Host.PutNetwork("lan", false)

	vs, err := a.Client.Moves(ctx, "", "")
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string][]maint.Code)
	var order []string
	for _, v := range vs {
		pair := v.Guest + " " + v.Peer
		order = append(order, pair)
		got[pair] = codesOf(v)
		if v.CanMove != (len(v.Problems) == 0) || v.GuestUUID == "" {
			t.Errorf("%+v", v)
		}
	}
	if d := cmp.Diff([]string{"one b", "one c", "two b", "two c"}, order); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(map[string][]maint.Code{
		"one b": nil,
		"one c": {maint.CodeCPU, maint.CodeNetwork},
		"two b": {maint.CodeDiskNotShared},
		"two c": {maint.CodeCPU, maint.CodeDiskMissing, maint.CodeSecret},
	}, got); d != "" {
		t.Error(d)
	}
	onlyFile(t, shared, "one.raw")
	onlyFile(t, filepath.Join(a.Root, "own"), "two.raw")
	for _, n := range w.Nodes {
		s, err := n.Client.Status(ctx)
		if err != nil || len(s.Operations)+len(s.Reservations) > 0 {
			t.Errorf("left of the question: %+v, %v", s, err)
		}
	}

	// A migration says the same, and one that may go goes.
	op := await(t, ctx, a, begin(t, a, maint.MigrateRequest{Guest: "two", To: "b"}))
	if op.Outcome != maint.OutcomeBlocked || len(op.Problems) != 1 || op.Problems[0].Code != maint.CodeDiskNotShared {
		t.Errorf("migration of two: %+v", op)
	}
	if op := await(t, ctx, a, begin(t, a, maint.MigrateRequest{Guest: "one", To: "b"})); op.Outcome != maint.OutcomeDone {
		t.Errorf("migration of one: %+v", op)
	}
	onlyFile(t, shared, "one.raw")
}

func begin(t *testing.T, n *agenttest.Node, r maint.MigrateRequest) maint.OpID {
	t.Helper()
	op, err := n.Client.Migrate(ctxFor(t, patience), r)
	if err != nil {
		t.Fatal(err)
	}
	return op.ID
}

// TestMovesOfEngagedGuests: what Belay is about is a reason, and a peer that is
// away is one beside others.
func TestMovesOfEngagedGuests(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	a, ctx := w.Nodes[0], ctxFor(t, patience)
	uuid := a.Host.PutGuest("web-1", autostarted)
	began := copying(w)
	a.Host.HoldCopies()
	id := begin(t, a, toB)
	<-began
	vs, err := a.Client.Moves(ctx, "web-1", "b")
	if err != nil || len(vs) != 1 || vs[0].CanMove || vs[0].Problems[0].Code != maint.CodeBusy || !strings.Contains(vs[0].Problems[0].Reason, string(id)) {
		t.Errorf("while it moves: %+v, %v", vs, err)
	}
	a.Host.ReleaseCopies()
	ends(t, w, await(t, ctx, a, id), uuid, maint.OutcomeDone, "")

	a.Host.Stop(t, a.Host.PutGuest("web-2"), "shutdown")
	w.Nodes[1].Stop()
	vs, err = a.Client.Moves(ctx, "", "")
	if err != nil || len(vs) != 1 {
		t.Fatalf("%+v, %v", vs, err)
	}
	if d := cmp.Diff([]maint.Code{maint.CodeGuestOff, maint.CodePeerDown}, codesOf(vs[0])); d != "" {
		t.Error(d)
	}
	for _, ask := range [][2]string{{"nobody", ""}, {"web-2", "nowhere"}} {
		if _, err := a.Client.Moves(ctx, ask[0], ask[1]); len(refusal(t, err)) != 1 {
			t.Errorf("%q: %v", ask, err)
		}
	}
	a.Host.KillLibvirt()
	if _, err := a.Client.Moves(ctx, "", ""); refusal(t, err)[0] != maint.CodeHypervisorDown {
		t.Errorf("without libvirt: %v", err)
	}
}

// TestHugePagesArePromised: two guests are not promised the same ones.
func TestHugePagesArePromised(t *testing.T) {
	t.Parallel()
	w := agenttest.NewOn(t, quiet(t), map[string]hypervisortest.HostOptions{"b": {HugePages: []maint.PagePool{{PageBytes: 2 << 20, Free: 40}}}}, nil, "a", "b")
	ctx := ctxFor(t, patience)
	fromA := peerOf(t, w.Nodes[1], "a")
	arrival := func(n int) maint.Arrival {
		return maint.Arrival{Op: maint.OpID(fmt.Sprint("mig-", n)), Guest: fmt.Sprint("web-", n), GuestUUID: fmt.Sprintf("10000000-0000-4000-8000-00000000000%d", n),
			MemoryBytes: 64 << 20, DomainType: "qemu", Pages: []maint.PageNeed{{PageBytes: 2 << 20, Bytes: 64 << 20}}}
	}
	if _, err := fromA.Reserve(ctx, arrival(1)); err != nil {
		t.Fatal(err)
	}
	if got := refusal(t, errOf(fromA.Reserve(ctx, arrival(2)))); len(got) != 1 || got[0] != maint.CodeNoPages {
		t.Errorf("the second is refused for %v", got)
	}
	if err := fromA.Release(ctx, "mig-1"); err != nil {
		t.Fatal(err)
	}
	second := arrival(2)
	second.Needs = &maint.Needs{SwTPM: true} // is for a check to refuse, not for a reservation
	if _, err := fromA.Reserve(ctx, second); err != nil {
		t.Errorf("when the first has given them up: %v", err)
	}
}

// TestMarksOfAKilledAgent are removed by the next one.
func TestMarksOfAKilledAgent(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	a, shared := w.Nodes[0], sharing(t, w)
	put(t, filepath.Join(shared, "one.raw"), "disk")
	a.Stop()
	marks := local.New(a.Root, filepath.Join(a.Config.StateDir, "marks"))
	needs, _ := marks.Mark(t.Context(), []maint.FileNeed{{For: "disk vda", Path: "/srv/one.raw", Kind: maint.FileRegular, Same: true}})
	mark := filepath.Join(shared, needs[0].Mark)
	if _, err := os.Lstat(mark); err != nil || needs[0].Mark == "" {
		t.Fatalf("no mark: %+v, %v", needs, err)
	}
	a.Start(nil)
	for ctx := ctxFor(t, patience); ; {
		if _, err := os.Lstat(mark); errors.Is(err, os.ErrNotExist) {
			break
		}
		if _, err := a.Client.Status(ctx); err != nil {
			t.Fatal(err)
		}
	}
	onlyFile(t, shared, "one.raw")
}
