package agent_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"belay/agent/agenttest"
	"belay/agent/config"
	"belay/agent/maint"
	"belay/patch/kexec/kexectest"
	"belay/patch/vmm/vmmtest"
)

const holdManifest = "id = \"u\"\n[[changes]]\nname = \"c\"\nkind = \"network\"\napply = {command = [\"sleep\", \"20ms\"], expected = \"20ms\"}\n"

// planOf is what a node plans of a manifest, with one word for each guest: its rungs, and
// where it goes.
func planOf(t *testing.T, n *agenttest.Node, manifest string, o ...maint.PlanOptions) (p maint.Plan, guests string) {
	t.Helper()
	p, err := n.Client.Plan(ctxFor(t, patience), maint.PlanRequest{Manifest: manifest, Options: append(o, maint.PlanOptions{})[0]})
	check(t, err)
	if read, err := maint.DecodePlan("p", p.Encode()); err != nil || read.Hash != p.Hash {
		t.Errorf("the plan is not as it was made, when it has come over the API: %v", err)
	}
	var words []string
	for _, g := range p.Guests {
		word := fmt.Sprintf("%s:%s", g.Guest, g.Rung)
		if g.To != "" {
			word += ">" + g.To
		}
		words = append(words, word)
	}
	return p, strings.Join(words, " ")
}

// TestPlanOfLivepatch: the very checks that would refuse to load it decide.
func TestPlanOfLivepatch(t *testing.T) {
	t.Parallel()
	b := newPatchBed(t, nil)
	manifest := func(file string) string {
		return fmt.Sprintf("id = \"u\"\nurgency = \"security\"\n[[changes]]\nname = \"fix\"\nkind = \"livepatch\"\nfile = %q\n", file)
	}
	p, guests := planOf(t, b.Node, manifest(b.file("fix_1")))
	if guests != "web-1:A" || len(p.Blockers) > 0 || p.Changes[0].Rung != maint.RungA {
		t.Errorf("%s", p.Text())
	}
	b.must(b.apply("fix_2"), maint.OutcomeDone)
	p, _ = planOf(t, b.Node, manifest(b.file("fix_2")))
	if len(p.Blockers) != 1 || p.Changes[0].Refused[0].Problems[0].Code != maint.CodePatchLoaded {
		t.Errorf("it is loaded already, and planned all the same:\n%s", p.Text())
	}
	// Microcode: this kernel loads it late.
	if p, guests := planOf(t, b.Node, "id = \"u\"\n[[changes]]\nname = \"m\"\nkind = \"microcode\"\n"); guests != "web-1:A" && len(p.Changes[0].Refused) == 0 {
		t.Errorf("%s", p.Text())
	}
}

// TestPlanOfKernel: what rung B3 would refuse a guest for sends that guest away, and what it
// would refuse the host for all.
func TestPlanOfKernel(t *testing.T) {
	t.Parallel()
	b := newKexecBed(t, nil)
	manifest := "id = \"u\"\n[[changes]]\nname = \"kernel\"\nkind = \"kernel\"\nexpected = \"50ms\"\n" +
		fmt.Sprintf("kernel = \"/boot/vmlinuz-%s\"\ninitrd = \"/boot/initrd.img-%s\"\n", kexectest.Next, kexectest.Next)
	p, guests := planOf(t, b.Node, manifest)
	if guests != "app-1:B3 db-1:B3 old-1:A ram-1:B3" || len(p.Blockers) > 0 {
		t.Errorf("%s: %s", guests, p.Text())
	}
	if !strings.Contains(p.Guests[2].Note, "is left so") {
		t.Errorf("of the guest that its owner has paused it says %q", p.Guests[2].Note)
	}
	if op := b.kexec(); op.Outcome != maint.OutcomeDone {
		t.Fatalf("%+v", op.Problems)
	}
	p, _ = planOf(t, b.Node, manifest)
	if e := p.Guests[0].Pause; e == nil || !strings.Contains(e.From, "on this host") {
		t.Errorf("what guests have felt of the boot is not known: %+v", e)
	}
	p, guests = planOf(t, b.Node, strings.ReplaceAll(manifest, kexectest.Next, "9.9"))
	if guests != "app-1: db-1: old-1: ram-1:" || len(p.Blockers) != 4 || p.Changes[0].Rung != maint.RungD {
		t.Errorf("a kernel that is not there: %s: %s", guests, p.Text())
	}
	b.whole("never")
}

// TestPlanOfHold goes through what can stand in the way of a hold, and of the moves in its
// place.
func TestPlanOfHold(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a", "b")
	a := w.Nodes[0]
	uuid := a.Host.PutGuest("web-1")
	a.Host.PutGuest("web-2")
	a.Host.Pause(t, a.Host.PutGuest("web-3"))
	a.Host.Stop(t, a.Host.PutGuest("web-4"), "shutdown")
	p, guests := planOf(t, a, holdManifest)
	if guests != "web-1:B1 web-2:B1 web-3:A" || !slices.Equal(p.Off, []string{"web-4"}) {
		t.Errorf("%s: %s", guests, p.Text())
	}
	set := func(policy maint.GuestPolicy) {
		t.Helper()
		_, err := a.Client.SetPolicy(t.Context(), "web-1", policy)
		check(t, err)
	}
	set(maint.GuestPolicy{Refuse: []maint.Rung{maint.AllOfB}})
	if p, guests := planOf(t, a, holdManifest); guests != "web-1:D>b web-2:B1 web-3:A" {
		t.Errorf("%s: %s", guests, p.Text())
	}
	if p, guests := planOf(t, a, holdManifest, maint.PlanOptions{To: []string{"b"}, Return: true}); guests != "web-1:D>b web-2:B1 web-3:A" || p.Guests[0].Pauses != 2 {
		t.Errorf("%s: %s", guests, p.Text())
	}
	// The peer takes nobody in.
	_, err := w.Nodes[1].Client.Cordon(t.Context(), "disk")
	check(t, err)
	p, guests = planOf(t, a, holdManifest)
	if guests != "web-1: web-2:B1 web-3:A" || len(p.Blockers) != 1 || !slices.ContainsFunc(p.Guests[0].Refused, func(r maint.RefusedRung) bool {
		return r.Rung == maint.RungD && r.Problems[0].Code == maint.CodeCordoned
	}) {
		t.Errorf("%s: %s", guests, p.Text())
	}
	// A policy that cannot be read may forbid anything.
	check(t, a.Host.SetPolicy(t.Context(), uuid, "refuse = B1"))
	if p, guests := planOf(t, a, holdManifest); guests != "web-1: web-2:B1 web-3:A" || !strings.Contains(p.Text(), "its policy in <metadata> cannot be read") {
		t.Errorf("%s: %s", guests, p.Text())
	}
	set(maint.GuestPolicy{})
	// What was felt is what is predicted.
	for range 2 {
		op, err := a.Client.Hold(t.Context(), maint.HoldRequest{All: true, Step: maint.HostStep{Command: []string{"sleep", "20ms"}}})
		check(t, err)
		if op = await(t, ctxFor(t, patience), a, op.ID); op.Outcome != maint.OutcomeDone {
			t.Fatalf("%+v", op.Problems)
		}
	}
	p, _ = planOf(t, a, holdManifest)
	if e := p.Guests[0].Pause; e == nil || e.From != "2 runs of the step" || len(p.Calibration) != 1 || p.Calibration[0].Of != 3 {
		t.Errorf("%+v, %+v", e, p.Calibration)
	}
	// While something is under way with a guest, it has to be waited for.
	a.Host.HoldCopies()
	check(t, w.Nodes[1].Client.Uncordon(t.Context()))
	_, err = a.Client.Migrate(t.Context(), maint.MigrateRequest{Guest: "web-2", To: "b"})
	check(t, err)
	p, guests = planOf(t, a, holdManifest)
	if guests != "web-1:B1 web-2: web-3:A" || !slices.ContainsFunc(p.Guests[1].Refused, func(r maint.RefusedRung) bool { return r.Problems[0].Code == maint.CodeBusy }) {
		t.Errorf("%s: %s", guests, p.Text())
	}
	a.Host.ReleaseCopies()
}

// TestPlanOfTold: notice, windows and questions are of the host's events and the guests'
// policies.
func TestPlanOfTold(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), func(c *config.Config) {
		c.Events = config.Events{Enabled: true, Policy: "all", Notice: map[string]config.Duration{"Freeze": {Duration: 20 * time.Minute}},
			Owners: map[string]config.Owner{"shop": {Guests: []string{"shop-*"}}}}
		c.Policy.Guests = []config.GuestRules{{Names: []string{"shop-*"}, Rules: config.Rules{Ask: []maint.Rung{"B"}}}}
	}, "a")
	a := w.Nodes[0]
	a.Host.PutGuest("web-1")
	a.Host.PutGuest("shop-1")
	night := maint.Window{Rule: "FREQ=DAILY;BYHOUR=2;BYMINUTE=0", Zone: "UTC", Length: 3 * time.Hour}
	_, err := a.Client.SetPolicy(t.Context(), "web-1", maint.GuestPolicy{Windows: []maint.Window{night}})
	check(t, err)
	p, guests := planOf(t, a, strings.ReplaceAll(holdManifest, "id =", "within = \"48h\"\nid ="))
	if guests != "shop-1:C web-1:C" || !p.Guests[0].Asked || !p.Guests[0].Begin.Equal(p.Made.Add(48*time.Hour)) {
		t.Errorf("%s: %s", guests, p.Text())
	}
	v, err := a.Client.Policy(t.Context(), "shop-1")
	check(t, err)
	if v.Whole.Owner != "shop" || v.Whole.Notice != 20*time.Minute || len(v.Problems) > 0 {
		t.Errorf("%+v", v)
	}
	_, err = a.Client.SetPolicy(t.Context(), "shop-1", maint.GuestPolicy{Ask: []maint.Rung{}})
	check(t, err)
	p, guests = planOf(t, a, holdManifest)
	if guests != "shop-1:B1 web-1:C" || p.Guests[0].Begin.Hour() < 2 || p.Guests[0].Begin.Hour() > 4 {
		t.Errorf("%s: %s", guests, p.Text())
	}
	p, guests = planOf(t, a, strings.ReplaceAll(holdManifest, "id =", "urgency = \"emergency\"\nid ="))
	if guests != "shop-1:B1 web-1:B1" || !p.Guests[0].Begin.Equal(p.Made) {
		t.Errorf("%s: %s", guests, p.Text())
	}
	// Another owner than the host says, and a window that does not open.
	for _, bad := range []maint.GuestPolicy{{Owner: "bank"}, {Windows: []maint.Window{{Rule: "FREQ=YEARLY;BYMONTH=2;BYMONTHDAY=29;BYHOUR=2", Zone: "UTC", Length: 3 * time.Hour}}}} {
		var refusal *maint.Refusal
		if _, err := a.Client.SetPolicy(t.Context(), "shop-1", bad); !errors.As(err, &refusal) || refusal.Problems[0].Code != maint.CodePolicy {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

// TestPlanOfQEMU: each guest's cheapest method, and who has the new one.
func TestPlanOfQEMU(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), nil, "a")
	a := w.Nodes[0]
	a.Stop()
	a.Machine = vmmtest.New(t, a.Host)
	a.Machine.PutGuest(t, "web-1")
	a.Machine.PutGuest(t, "gpu-1", func(g *maint.Guest) {
		g.Devices = append(g.Devices, maint.Device{Kind: "hostdev", Type: "pci", Source: "0000:3b:00.0"})
	})
	a.Start(nil)
	const manifest = "id = \"u\"\n[[changes]]\nname = \"qemu\"\nkind = \"qemu\"\n"
	choices, err := a.Client.ReplaceChoices(t.Context(), "web-1")
	check(t, err)
	p, guests := planOf(t, a, manifest)
	g := p.Guests[1]
	if guests != "gpu-1: web-1:B2" || g.Method != choices[0].Method || g.Pause.Typical != choices[0].Pause || len(p.Blockers) != 1 {
		t.Errorf("%s, of %+v:\n%s", guests, choices, p.Text())
	}
	op, err := a.Client.Replace(t.Context(), maint.ReplaceRequest{Guest: "web-1"})
	check(t, err)
	if op = await(t, ctxFor(t, patience), a, op.ID); op.Outcome != maint.OutcomeDone {
		t.Fatalf("%+v", op.Problems)
	}
	p, _ = planOf(t, a, manifest)
	if e := p.Guests[1].Pause; e.Typical != op.Replaced.Pause || e.From != "1 on this host" {
		t.Errorf("%+v, and it has felt %s", e, op.Replaced.Pause)
	}
	p, guests = planOf(t, a, manifest+"version = \""+op.Replaced.NewQEMU+"\"\n")
	if guests != "gpu-1:A web-1:A" || !strings.Contains(p.Guests[1].Note, "already") {
		t.Errorf("%s:\n%s", guests, p.Text())
	}
}

// TestPlanOfQEMULivepatch: QEMUs are patched while they run if all of them can be.
func TestPlanOfQEMULivepatch(t *testing.T) {
	t.Parallel()
	b := newQEMUBed(t)
	manifest := fmt.Sprintf("id = \"u\"\n[[changes]]\nname = \"qemu\"\nkind = \"qemu\"\nrungs = [\"A\"]\nfile = %q\n", b.container())
	p, guests := planOf(t, b.Node, manifest)
	if guests != "web-1:A web-2:A web-3:A" || len(p.Blockers) > 0 {
		t.Errorf("%s:\n%s", guests, p.Text())
	}
	b.has("") // nothing is done
	b.Host.PutGuest("stock-1")
	p, _ = planOf(t, b.Node, manifest)
	if len(p.Blockers) != 1 || !strings.Contains(p.Text(), "guest stock-1") {
		t.Errorf("one cannot be patched:\n%s", p.Text())
	}
}
