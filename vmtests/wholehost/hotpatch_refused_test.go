package wholehost

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"belay/agent/maint"
	"belay/patch/live"
	"belay/patch/live/livetest"
	"belay/vmtests/livepatch"
)

// refusals: what is no livepatch for this kernel is not loaded, and is told why.
func (b *patchBed) refusals() {
	b.begin(livepatch.Fix1)
	good := func() live.Artifact { return b.set.Signed(b.t, b.vendor, livepatch.Fix2, nil) }
	changed := func(f func(*live.Artifact)) live.Artifact { a := good(); f(&a); return a }
	other := b.modules(b.Image.Kernels[1])
	for _, c := range []struct {
		name  string
		a     live.Artifact
		code  maint.Code
		words string
	}{
		{"already loaded", b.set.Signed(b.t, b.vendor, livepatch.Fix1, nil), maint.CodePatchLoaded, "loaded already"},
		{"cut short", changed(func(a *live.Artifact) { a.Module = a.Module[:len(a.Module)/2] }), maint.CodePatchFile, "cut short"},
		{"one bit other", changed(func(a *live.Artifact) { a.Module = flip(a.Module) }), maint.CodePatchHash, "SHA-256"},
		{"manifest edited", changed(func(a *live.Artifact) {
			a.Manifest = bytes.Replace(a.Manifest, []byte("CVE-"), []byte("CWE-"), 1)
		}), maint.CodePatchSigned, "not that of this manifest"},
		{"signed by a stranger", b.set.Signed(b.t, livetest.NewVendor(b.t), livepatch.Fix2, nil), maint.CodePatchSigned, "not trusted here"},
		{"no signature", changed(func(a *live.Artifact) { a.Signature = nil }), maint.CodePatchSigned, "cannot be read"},
		{"no livepatch", b.set.Signed(b.t, b.vendor, livepatch.Sleeper, nil), maint.CodeNoLivepatch, "is no livepatch"},
		{"another kernel", other.Signed(b.t, b.vendor, livepatch.Fix2, nil), maint.CodeWrongKernel, "it is for kernel " + other.Release},
		{"another kernel, passed off as this", other.Signed(b.t, b.vendor, livepatch.Fix2, func(m *live.Manifest) {
			m.Release, m.Version = b.set.Release, b.set.Version
		}), maint.CodeWrongKernel, "its vermagic is"},
		{"another build", b.set.Signed(b.t, b.vendor, livepatch.Fix2, func(m *live.Manifest) { m.Version = "#1 SMP Debian 6.1.1-1" }),
			maint.CodeWrongKernel, "it is for build"},
		{"not cumulative", b.set.Signed(b.t, b.vendor, livepatch.Fix2, func(m *live.Manifest) { m.Cumulative = false }), maint.CodePatchStack, "not cumulative"},
	} {
		file := b.put(c.a)
		op, code := b.patch("apply", file)
		b.refused(op, code, c.code, c.words)
	}
	// What inspect finds is found by the same code, and told beforehand.
	if text := b.belayText(3, "patch", "inspect", b.put(changed(func(a *live.Artifact) { a.Module = flip(a.Module) }))); !strings.Contains(text, "and was signed as") {
		b.t.Errorf("belay patch inspect says %q", text)
	}
	op, code := b.patch("apply", "/root/none.ko")
	b.refused(op, code, maint.CodePatchFile, "no such file")
	op, code = b.patch("apply", b.signed(livepatch.Lost))
	b.failed(op, code, maint.CodeKernelRefused, "the kernel does not take it")
	if op, code = b.patch("revert", livepatch.Fix2); code != 70 || op.Outcome != maint.OutcomeBlocked {
		b.t.Errorf("to revert what is not there: exit code %d, %+v", code, op)
	}
	b.has(livepatch.Fix1)
}

func flip(module []byte) []byte {
	other := slices.Clone(module)
	other[len(other)/2] ^= 1
	return other
}

// others: what somebody else has loaded is shown as theirs, covers nothing, and stands in the
// way; one in transition does, too, and is followed.
func (b *patchBed) others() {
	b.begin("")
	b.script("insmod " + b.module(livepatch.Fix1))
	if list := b.belayText(0, "patch", "list"); !strings.Contains(list, livepatch.Fix1) || !strings.Contains(list, "somebody else") {
		b.t.Errorf("belay patch list:\n%s", list)
	}
	b.belayText(1, "patch", "covers", "CVE-"+livepatch.Fix1)
	op, code := b.patch("apply", b.signed(livepatch.Fix2))
	b.refused(op, code, maint.CodePatchStack, "somebody else")
	op, code = b.patch("revert", livepatch.Fix1)
	b.refused(op, code, maint.CodePatchStack, "somebody else")
	b.script(gone(livepatch.Fix1))

	b.script("insmod " + b.module(livepatch.Sleeper) + "; insmod " + b.module(livepatch.Stall))
	op, code = b.patch("apply", b.signed(livepatch.Fix2))
	b.refused(op, code, maint.CodeTransition, livepatch.Stall)
	watched := make(chan string, 1)
	go func() {
		r, err := b.h.Belay(b.ctx(2*time.Minute), "patch", "watch")
		if err != nil || r.Code != 0 {
			b.t.Errorf("belay patch watch: %+v, %v", r, err)
		}
		watched <- r.Stderr
	}()
	select {
	case text := <-watched:
		b.t.Errorf("belay patch watch has ended in the transition: %s", text)
	case <-time.After(3 * time.Second):
		b.script("echo 0 >/sys/module/" + livepatch.Sleeper + "/parameters/hold")
		if text := <-watched; !strings.Contains(text, "in transition") || !strings.Contains(text, livepatch.Sleeper) {
			b.t.Errorf("belay patch watch says %q", text)
		}
	}
	b.script(gone(livepatch.Stall) + "\nrmmod " + livepatch.Sleeper)
	b.has("")
}

// gone takes a livepatch back by hand.
func gone(name string) string {
	return "echo 0 >/sys/kernel/livepatch/" + name + "/enabled\nuntil rmmod " + name + " 2>/dev/null; do sleep .2; done"
}

// contract: this kernel keeps to what package live relies on, as the one of its other tests does.
func (b *patchBed) contract() {
	b.begin("")
	binary := filepath.Join(b.t.TempDir(), "live.test")
	build := exec.CommandContext(b.ctx(5*time.Minute), "go", "test", "-c", "-o", binary, "belay/patch/live")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // static: the host has another libc
	if out, err := build.CombinedOutput(); err != nil {
		b.t.Fatalf("%v: %s", err, out)
	}
	for from, to := range map[string]string{binary: "live.test", b.set.File(livepatch.Fix1): "a.ko", b.set.File(livepatch.Fix2): "b.ko", b.set.File(livepatch.Stall): "held.ko"} {
		if err := b.h.Copy(b.ctx(time.Minute), from, "/root/contract/"+to); err != nil {
			b.t.Fatal(err)
		}
	}
	b.script("insmod " + b.module(livepatch.Sleeper))
	r, err := b.h.Exec(b.ctx(5*time.Minute), "env", "BELAY_LIVEPATCHES=/root/contract", "/root/contract/live.test", "-test.run=OfThisKernel", "-test.v")
	b.t.Logf("%s%s", r.Stdout, r.Stderr)
	if err != nil || r.Code != 0 || strings.Contains(r.Stdout, "SKIP") {
		b.t.Errorf("exit code %d, %v", r.Code, err)
	}
	b.script("rmmod " + livepatch.Sleeper)
	b.has("")
}
