package agent_test

import (
	"fmt"
	"strings"
	"testing"

	"belay/agent/agenttest"
	"belay/agent/maint"
	"belay/patch/kexec/kexectest"
	"belay/patch/vmm/vmmtest"
)

// applyOn applies an update to a host, and gives it as it has ended, and the operations that
// it had.
func applyOn(t *testing.T, n *agenttest.Node, manifest string) (op maint.Op, parts string) {
	t.Helper()
	ctx := ctxFor(t, patience)
	p, err := n.Client.Plan(ctx, maint.PlanRequest{Manifest: manifest})
	check(t, err)
	op, err = n.Client.Apply(ctx, maint.ApplyRequest{Plan: p})
	if err != nil {
		t.Fatalf("%v\n%s", err, p.Text())
	}
	op = await(t, ctx, n, op.ID)
	ops, err := n.Client.Ops(ctx)
	check(t, err)
	var all []string
	for _, o := range ops {
		if o.Part == op.ID {
			all = append(all, fmt.Sprintf("%s %s", o.Kind, o.Outcome))
		}
	}
	return op, strings.Join(all, "; ")
}

// TestApplyLivepatch: it is loaded, and reverted when the host is not well with it.
func TestApplyLivepatch(t *testing.T) {
	t.Parallel()
	b := newPatchBed(t, nil)
	manifest := func(name string) string {
		return fmt.Sprintf("id = \"u\"\n[[changes]]\nname = \"fix\"\nkind = \"livepatch\"\nfile = %q\n", b.file(name))
	}
	op, parts := applyOn(t, b.Node, manifest("fix_1"))
	b.must(op, maint.OutcomeDone)
	if _, loaded := b.settled(); parts != "patch done" || !strings.Contains(loaded, "fix_1") {
		t.Errorf("%s; loaded: %s", parts, loaded)
	}
	b.must(b.patch(maint.PatchRequest{Action: maint.PatchRevert, Name: "fix_1"}), maint.OutcomeDone)
	op, parts = applyOn(t, b.Node, manifest("fix_2")+goesBad)
	b.must(op, maint.OutcomeFailed)
	if _, loaded := b.settled(); parts != "patch done; patch done" || strings.Contains(loaded, "fix_2") {
		t.Errorf("%s; loaded: %s", parts, loaded)
	}
}

// TestApplyQEMU: each guest gets a new QEMU, and when the host is not well then, another one
// after the change was taken back.
func TestApplyQEMU(t *testing.T) {
	t.Parallel()
	const manifest = "id = \"u\"\n[[changes]]\nname = \"qemu\"\nkind = \"qemu\"\n[changes.prepare]\ncommand = [\"true\", \"install\"]\n[changes.undo]\ncommand = [\"true\", \"undo\"]\n"
	for _, c := range []struct {
		manifest string
		want     maint.Outcome
		parts    string
		did      string
	}{
		{manifest, maint.OutcomeDone, "replace-vmm done; replace-vmm done", "prepare"},
		{manifest + goesBad, maint.OutcomeFailed, "replace-vmm done; replace-vmm done; replace-vmm done; replace-vmm done", "prepare undo"},
	} {
		w := agenttest.New(t, quiet(t), nil, "a")
		a := w.Nodes[0]
		a.Stop()
		a.Machine = vmmtest.New(t, a.Host)
		uuids := []string{a.Machine.PutGuest(t, "web-1"), a.Machine.PutGuest(t, "web-2")}
		var did []string
		a.Steps.Did = func(name string) {
			if i := strings.LastIndex(name, "-"); !strings.Contains(name, "check") {
				did = append(did, name[i+1:])
			}
		}
		a.Start(nil)
		op, parts := applyOn(t, a, c.manifest)
		if op.Outcome != c.want || parts != c.parts || strings.Join(did, " ") != c.did {
			t.Errorf("%s %v: %s; did %v", op.Outcome, op.Problems, parts, did)
		}
		for _, uuid := range uuids {
			if running, defined := places(t, w, uuid); running != "a" || defined != "a" {
				t.Errorf("%s runs on %q, and is defined on %q", uuid, running, defined)
			}
		}
	}
}

// TestApplyKernel: the host boots another kernel in the middle of it, and the old one again
// when it is not well with that. What the update covers counts as long as that kernel runs.
func TestApplyKernel(t *testing.T) {
	t.Parallel()
	manifest := fmt.Sprintf("id = \"u\"\n[[changes]]\nname = \"kernel\"\nkind = \"kernel\"\nkernel = \"/boot/vmlinuz-%[1]s\"\ninitrd = \"/boot/initrd.img-%[1]s\"\n", kexectest.Next)
	b := newKexecBed(t, nil)
	running := b.Kernel.Release
	op, parts := applyOn(t, b.Node, "covers = [\"CVE-2026-1\"]\n"+manifest+fmt.Sprintf("version = %q\n", running))
	if op.Outcome != maint.OutcomeDone || parts != "kexec done" || b.boots != 1 {
		t.Errorf("%s %v: %s, %d boots", op.Outcome, op.Problems, parts, b.boots)
	}
	b.whole("nowhere")
	for change, want := range map[string]maint.CoverageVerdict{"CVE-2026-1": maint.Covered, "CVE-2026-12": maint.CoverageUnsure} {
		if v, err := b.Client.Coverage(b.ctx, change); err != nil || v.Verdict != want {
			t.Errorf("%s: %+v, %v", change, v, err)
		}
	}
	b = newKexecBed(t, nil)
	op, parts = applyOn(t, b.Node, manifest+goesBad)
	if op.Outcome != maint.OutcomeFailed || parts != "kexec done; kexec done" || b.boots != 2 {
		t.Errorf("%s %v: %s, %d boots", op.Outcome, op.Problems, parts, b.boots)
	}
	b.whole("nowhere")
}

// TestApplyKernelWithoutGuest: when a guest cannot run under the new kernel nothing follows that
// could end it for good, neither a step nor the way back.
func TestApplyKernelWithoutGuest(t *testing.T) {
	t.Parallel()
	b := newKexecBed(t, nil)
	b.onBoot = func(_ int, release string) string {
		check(b.t, b.Host.Launch(b.ctx, b.uuids[0])) // somebody has started it over again
		check(b.t, b.Host.SetAutostart(b.ctx, b.uuids[0], true))
		return release
	}
	op, parts := applyOn(t, b.Node, fmt.Sprintf("id = \"u\"\n[[changes]]\nname = \"kernel\"\nkind = \"kernel\"\nkernel = \"/boot/vmlinuz-%[1]s\"\ninitrd = \"/boot/initrd.img-%[1]s\"\n", kexectest.Next)+goesBad)
	s, err := b.Client.Status(b.ctx)
	check(t, err)
	if op.Outcome != maint.OutcomeStuck || parts != "kexec partly" || b.boots != 1 || s.Cordon == nil || !strings.Contains(fmt.Sprint(op.Problems), "app-1") {
		t.Errorf("%s %v: %s, %d boots, cordoned: %v", op.Outcome, op.Problems, parts, b.boots, s.Cordon)
	}
}
