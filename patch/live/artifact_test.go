package live_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/patch/live"
	"belay/patch/live/livetest"
)

// TestRefusals: each has its name, its reason and its remedy, and nothing is loaded.
func TestRefusals(t *testing.T) {
	t.Parallel()
	type bed struct {
		*bench
		a live.Artifact
	}
	for _, c := range []struct {
		name string
		spec func(*livetest.Spec)
		do   func(*bed)
		want maint.Code
		says string
	}{
		{"wrong release", func(s *livetest.Spec) { s.Release = "6.1.0-26-amd64" }, nil, maint.CodeWrongKernel, "6.1.0-26-amd64"},
		{"another build of the release", func(s *livetest.Spec) { s.Version = "#1 SMP Debian 6.1.112-1" }, nil, maint.CodeWrongKernel, "6.1.112-1"},
		{"vermagic and manifest differ", func(s *livetest.Spec) { s.VerMagic = "6.1.0-20-amd64 SMP " }, nil, maint.CodeWrongKernel, "6.1.0-20-amd64"},
		{"another build of a module", func(s *livetest.Spec) { s.Modules = map[string]string{"kvm": "AAAA"} },
			func(b *bed) { b.loadModule("kvm", "BBBB") }, maint.CodeWrongKernel, "module kvm"},
		{"bad hash", nil, func(b *bed) { b.a.Module = bytes.Replace(b.a.Module, []byte("depends"), []byte("depends="), 1) }, maint.CodePatchHash, "SHA-256"},
		{"truncated", nil, func(b *bed) { b.a.Module = b.a.Module[:len(b.a.Module)/2] }, maint.CodePatchFile, "cut short"},
		{"manifest edited", nil, func(b *bed) { b.a.Manifest = append(b.a.Manifest, "\n# more\n"...) }, maint.CodePatchSigned, "not that of this manifest"},
		{"unknown key", nil, func(b *bed) { b.a = livetest.NewVendor(b.t).Make("fix_a", b.Release, b.Version, nil) }, maint.CodePatchSigned, "not trusted"},
		{"no signature", nil, func(b *bed) { b.a.Signature = nil }, maint.CodePatchSigned, "cannot be read"},
		{"setting that is none", nil, func(b *bed) {
			b.a.Manifest = append(b.a.Manifest, "\nfrobnicate = 1\n"...)
			b.a.Signature = b.vendor.Sign(b.a.Manifest)
		}, maint.CodePatchFile, "manifest"},
		{"not a livepatch", func(s *livetest.Spec) { s.NoLivepatch = true }, nil, maint.CodeNoLivepatch, "no livepatch"},
		{"neither srcversion nor build ID", nil, func(b *bed) {
			b.a = b.vendor.Vouch(livetest.Module("name=fix_a", "vermagic="+b.Release+" SMP ", "livepatch=Y"), live.Manifest{Release: b.Release, Version: b.Version})
		}, maint.CodeNoLivepatch, "neither srcversion nor build ID"},
		{"already loaded", nil, func(b *bed) { b.force("fix_a") }, maint.CodePatchLoaded, "loaded already"},
		{"a module of that name", nil, func(b *bed) { b.loadModule("fix_a", "X") }, maint.CodePatchLoaded, "another module"},
		{"in transition", nil, func(b *bed) { b.Hold(120, "f"); b.force("other") }, maint.CodeTransition, "in transition"},
		{"somebody else's", nil, func(b *bed) { b.force("other") }, maint.CodePatchStack, "somebody else"},
		{"not cumulative", func(s *livetest.Spec) { s.Cumulative = false }, func(b *bed) { b.apply("fix_0") }, maint.CodePatchStack, "not cumulative"},
		{"tainted", nil, func(b *bed) { b.SetTaint(128) }, maint.CodeTainted, "tainted 128"},
		{"no livepatching", nil, func(b *bed) { b.remove("sys/kernel/livepatch") }, maint.CodeNeedsReboot, "CONFIG_LIVEPATCH"},
		{"no keys", nil, func(b *bed) { b.remove("etc/belay/keys") }, maint.CodePatchSigned, "keys"},
		{"keys for anybody to write", nil, func(b *bed) {
			if err := os.Chmod(filepath.Join(b.Host.Keys, "vendor.pub"), 0o666); err != nil {
				b.t.Fatal(err)
			}
		}, maint.CodePatchSigned, "others than root"},
		{"no log", nil, func(b *bed) { b.remove("dev/kmsg") }, maint.CodeUnwell, "log"},
		{"libvirt does not answer", nil, func(b *bed) { b.libvirt = maint.ErrHypervisorDown }, maint.CodeHypervisorDown, "libvirt"},
		{"compressed", nil, func(b *bed) {
			b.edit = func(file string) string { return strings.TrimSuffix(file, ".ko") + ".ko.xz" }
		}, maint.CodePatchFile, "no path"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := &bed{bench: newBench(t, livetest.Debian12())}
			b.a = b.vendor.Make("fix_a", b.Release, b.Version, c.spec)
			if c.do != nil {
				c.do(b)
			}
			loaded := func() string { return strings.ReplaceAll(b.Loaded(), "*", "") } // a transition may end meanwhile
			before := loaded()
			p := refusal(t, b.begin(b.a).Preflight(t.Context(), b.notes), c.want)
			if !strings.Contains(p.Error(), c.says) || p.Remedy == "" || p.Subject == "" {
				t.Errorf("the refusal is %q, of %q, remedy %q; want it to say %q", p.Reason, p.Subject, p.Remedy, c.says)
			}
			if now := loaded(); now != before {
				t.Errorf("loaded was %q, is %q", before, now)
			}
		})
	}
}

// TestDirectJudges: who does it judges it, whatever whoever asks has found.
func TestDirectJudges(t *testing.T) {
	t.Parallel()
	b := newBench(t, livetest.Debian12())
	a := b.vendor.Make("fix_a", b.Release, b.Version, nil)
	a.Module = append(a.Module, 0)
	if p := problem(t, b.Direct.Load(t.Context(), a)); p.Code != maint.CodePatchHash {
		t.Errorf("%+v", p)
	}
	wrong := b.vendor.Make("fix_a", "5.10", b.Version, nil)
	refusal(t, b.Direct.Load(t.Context(), wrong), maint.CodeWrongKernel)
	for _, name := range []string{"../../etc", "a/b", "", strings.Repeat("a", 60)} {
		if err := b.Direct.Enable(t.Context(), name, false); err != unix.EINVAL {
			t.Errorf("to disable %q gives %v", name, err)
		}
		if err := b.Direct.Unload(t.Context(), name); err != unix.EINVAL {
			t.Errorf("to unload %q gives %v", name, err)
		}
	}
	b.loadModule("kvm", "A")
	if err := b.Direct.Unload(t.Context(), "kvm"); err == nil {
		t.Error("a module that is no livepatch may be unloaded")
	}
}

// FuzzModInfo: what comes as a module is not trusted.
func FuzzModInfo(f *testing.F) {
	f.Add(livetest.Module("name=a", "vermagic=6.1 SMP", "livepatch=Y"))
	f.Add([]byte("\x7fELF"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if info, err := live.ReadModInfo(b); err == nil && info.Name == "" {
			t.Error("a module without a name")
		}
	})
}
