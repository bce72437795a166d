package wholehost

import (
	"context"
	"crypto/rand"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/patch/live"
	"belay/patch/live/livetest"
	"belay/vmtests/guest"
	"belay/vmtests/livepatch"
	"belay/vmtests/machine"
)

// patchBed is a host whose kernel is patched while its guests run, and livepatches for it.
type patchBed struct {
	*bed
	h      *machine.Host
	set    livepatch.Set
	vendor *livetest.Vendor
	files  map[string]string // livepatches in the host, by name
}

// patchConfig is belayd's. The watch after a livepatch is as short as it may be.
const patchConfig = `mkdir -p /etc/belay/belayd.d
cat >/etc/belay/belayd.d/patch.toml <<'END'
[patch]
soak = "5s"
health = ["/usr/local/sbin/host-is-well"]
END
printf '#!/bin/sh\ntouch /run/asked\n' >/usr/local/sbin/host-is-well
chmod 755 /usr/local/sbin/host-is-well
systemctl restart belayd.service`

func newPatchBed(t *testing.T) *patchBed {
	t.Helper()
	vendor, keys := livetest.NewVendor(t), t.TempDir()
	vendor.Trust(keys)
	pub, err := filepath.Glob(filepath.Join(keys, "*.pub"))
	if err != nil {
		t.Fatal(err)
	}
	b := &patchBed{bed: newEmptyBed(t, machine.Config{Keys: pub}), vendor: vendor, files: make(map[string]string)}
	b.h = b.Hosts[0]
	b.set = b.modules(b.h.Kernel)
	b.script(patchConfig)
	b.guest = b.start(b.h, web1(guest.Spec{}), guest.Spec{Name: "web-2", IP: netip.MustParsePrefix("10.77.1.2/16")})[0]
	b.meet()
	return b
}

// within is the bed in a subtest.
func (b *patchBed) within(t *testing.T) *patchBed {
	sub := *b
	sub.bed = b.bed.within(t)
	return &sub
}

// modules are those for one of the image's kernels.
func (b *patchBed) modules(release string) livepatch.Set {
	b.t.Helper()
	set, err := livepatch.Build(b.ctx(5*time.Minute), guest.DefaultCache(), b.Image.Kernel(release), slog.New(slog.NewTextHandler(b.t.Output(), nil)))
	if err != nil {
		b.t.Fatal(err)
	}
	return set
}

func (b *patchBed) script(text string) string {
	b.t.Helper()
	out, err := b.h.Script(b.ctx(3*time.Minute), text)
	if err != nil {
		b.t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// put puts a livepatch's three files into the host and gives the module's path there.
func (b *patchBed) put(a live.Artifact) string {
	b.t.Helper()
	file := livetest.Write(b.t, b.t.TempDir(), "patch", a)
	there := "/root/" + rand.Text() + "/patch"
	for _, ext := range []string{".ko", ".toml", ".toml.minisig"} {
		if err := b.h.Copy(b.ctx(time.Minute), strings.TrimSuffix(file, ".ko")+ext, there+ext); err != nil {
			b.t.Fatal(err)
		}
	}
	return there + ".ko"
}

// signed is a livepatch in the host, as it should be.
func (b *patchBed) signed(name string) string {
	b.t.Helper()
	if b.files[name] == "" {
		b.files[name] = b.put(b.set.Signed(b.t, b.vendor, name, nil))
	}
	return b.files[name]
}

// module puts a module into the host, to be loaded by hand.
func (b *patchBed) module(name string) string {
	b.t.Helper()
	file := "/root/" + name + ".ko"
	if err := b.h.Copy(b.ctx(time.Minute), b.set.File(name), file); err != nil {
		b.t.Fatal(err)
	}
	return file
}

// patch is 'belay patch', of which the operation is printed, and its exit code.
func (b *patchBed) patch(args ...string) (op maint.Op, code int) {
	b.t.Helper()
	r, err := b.h.BelayJSON(b.ctx(5*time.Minute), &op, append([]string{"patch"}, args...)...)
	if err != nil {
		b.t.Fatalf("belay patch %s: exit code %d: %v: %s%s", strings.Join(args, " "), r.Code, err, r.Stdout, r.Stderr)
	}
	return op, r.Code
}

// must is patch that comes to its end.
func (b *patchBed) must(args ...string) maint.Op {
	b.t.Helper()
	op, code := b.patch(args...)
	if code != 0 || op.Outcome != maint.OutcomeDone {
		b.t.Fatalf("belay patch %s: exit code %d, %s: %+v\n%s", strings.Join(args, " "), code, op.Outcome, op.Problems, b.dmesg())
	}
	return op
}

// dmesg is the end of what the kernel says.
func (b *patchBed) dmesg() string {
	out, _ := b.h.Run(context.WithoutCancel(b.t.Context()), "sh", "-c", "dmesg | tail -n 30") // it is told with what failed
	return out
}

// view is what belayd shows of the kernel.
func (b *patchBed) view() maint.PatchView {
	b.t.Helper()
	v, err := b.h.Client().Patches(b.ctx(time.Minute))
	if err != nil {
		b.t.Fatal(err)
	}
	return v
}

// The effects of livepatches, as whoever reads /proc/version sees them.
const unmended, mendedOnce, mendedTwice = "Linux version", "mended once", "mended twice"

// effect is what the running kernel does under a livepatch; "": under none.
func effect(name string) string {
	switch name {
	case livepatch.Fix1:
		return mendedOnce
	case livepatch.Fix2:
		return mendedTwice
	}
	return unmended
}

// has checks that the kernel has this one livepatch ("": none) and does what that changes,
// that Belay has it in its records, and that no module of another is left.
func (b *patchBed) has(name string) {
	b.t.Helper()
	v := b.view()
	var modules []string
	lines := strings.Split(b.script("cat /proc/version /proc/loadavg; ls -d /sys/module/belay_*/ 2>/dev/null || true"), "\n")
	for _, dir := range lines[2:] {
		modules = append(modules, filepath.Base(dir))
	}
	active, want := "", []string(nil)
	if v.Active != nil {
		active = v.Active.Name
	}
	if name != "" {
		want = []string{name}
	}
	switch mendsLoad := strings.HasSuffix(lines[1], "1/1 2"); {
	case !strings.HasPrefix(lines[0], effect(name)), mendsLoad != (name == livepatch.Fix2):
		b.t.Errorf("/proc/version is %q, /proc/loadavg %q", lines[0], lines[1])
	case active != name:
		b.t.Errorf("the record has %q as active", active)
	case len(v.Loaded) != len(want), name != "" && (v.Loaded[0].Name != name || !v.Loaded[0].Whole() || v.Loaded[0].Kept == nil):
		b.t.Errorf("the kernel has %+v", v.Loaded)
	case !slices.Equal(modules, want):
		b.t.Errorf("the kernel has the modules %v", modules)
	default:
		return
	}
	b.t.Fatalf("want %q to be active, whole, known, and alone; the kernel's log ends:\n%s", name, b.dmesg())
}

// begin has one livepatch be active, or none, whatever was.
func (b *patchBed) begin(name string) {
	b.t.Helper()
	active := b.view().Active
	switch {
	case name != "" && (active == nil || active.Name != name):
		b.must("apply", b.signed(name))
	case name == "" && active != nil:
		b.must("revert", active.Name)
	}
	b.has(name)
}

// refused checks that an operation was refused before any effect, with this among its
// reasons, and a remedy.
func (b *patchBed) refused(op maint.Op, code int, want maint.Code, words string) {
	b.t.Helper()
	i := slices.IndexFunc(op.Problems, func(p maint.Problem) bool { return p.Code == want && strings.Contains(p.Error(), words) })
	if code != 3 || op.Outcome != maint.OutcomeBlocked || i < 0 || op.Problems[i].Remedy == "" {
		b.t.Errorf("exit code %d, %s, %+v; want it blocked by %s: %s", code, op.Outcome, op.Problems, want, words)
	}
}

// failed checks that an operation went wrong after it had begun, with this among its reasons.
func (b *patchBed) failed(op maint.Op, code int, want maint.Code, words string) {
	b.t.Helper()
	if code != 1 || op.Outcome != maint.OutcomeFailed ||
		!slices.ContainsFunc(op.Problems, func(p maint.Problem) bool { return p.Code == want && strings.Contains(p.Error(), words) }) {
		b.t.Errorf("exit code %d, %s, %+v; want it undone for %s: %s", code, op.Outcome, op.Problems, want, words)
	}
}

// stepOf is the last try of a step.
func stepOf(t *testing.T, op maint.Op, name string) maint.Step {
	t.Helper()
	for _, s := range slices.Backward(op.Steps) {
		if s.Name == name {
			return s
		}
	}
	t.Fatalf("%s has no step %s: %+v", op.ID, name, op.Steps)
	return maint.Step{}
}
