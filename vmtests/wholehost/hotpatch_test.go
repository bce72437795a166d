package wholehost

import (
	"cmp"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/vmtests/livepatch"
	"belay/vmtests/observer"
)

// TestHotPatch: a host's kernel is changed while its guests run, by belayd and belay-kernel as
// systemd runs them, and livepatches that were built for it. The short form has what all goes
// well in, and one that is taken back.
func TestHotPatch(t *testing.T) {
	b := newPatchBed(t)
	names := []string{"web-1", "web-2"}
	for _, part := range []struct {
		name string
		long bool
		test func(*patchBed)
	}{
		{"unfelt", false, func(b *patchBed) { b.unfelt(names) }},
		{"figures", true, (*patchBed).figures},
		{"components", false, func(b *patchBed) { b.components(names) }},
		{"microcode", false, (*patchBed).microcode},
		{"refused", true, (*patchBed).refusals},
		{"others", true, (*patchBed).others},
		{"contract", true, (*patchBed).contract},
		{"warns", false, (*patchBed).warns},
		{"stalls", true, (*patchBed).stalls},
		{"killed", true, (*patchBed).killed},
		{"alive", false, func(b *patchBed) { b.alive(names) }},
		{"boots", true, (*patchBed).boots},
		{"oops", true, (*patchBed).oops},
	} {
		t.Run(part.name, func(t *testing.T) {
			if part.long {
				inFull(t)
			}
			part.test(b.within(t))
		})
	}
}

// unfelt: guests go on as they do without, while livepatches come, take each other's place,
// and go.
func (b *patchBed) unfelt(guests []string) {
	calm, names := 10*time.Second, []string{livepatch.Fix1, livepatch.Fix2}
	if long {
		calm = 30 * time.Second
	}
	b.has("")
	mark := b.obs.Mark()
	select {
	case <-time.After(calm): // what is measured is that nothing happens
	case <-b.t.Context().Done():
	}
	baseline := b.since(mark, guests)

	mark = b.obs.Mark()
	var all []taken
	for _, name := range names {
		all = append(all, b.timed(name))
		b.has(name)
	}
	list := b.belayText(0, "patch", "list")
	for _, want := range []string{livepatch.Fix2, "active", "vmlinux/version_proc_show,1", "CVE-" + livepatch.Fix2} {
		if !strings.Contains(list, want) {
			b.t.Errorf("belay patch list does not say %q:\n%s", want, list)
		}
	}
	b.belayText(0, "patch", "covers", "CVE-"+livepatch.Fix2)
	b.belayText(1, "patch", "covers", "CVE-"+livepatch.Fix1)
	b.belayText(0, "patch", "watch")
	b.must("revert", livepatch.Fix2)
	b.has("")
	b.belayText(1, "patch", "covers", "CVE-"+livepatch.Fix2)

	for i, r := range b.since(mark, guests) {
		calm := baseline[i]
		b.t.Logf("guest %s, with livepatches: %d heartbeats, %d lost, longest gap %s; without: %d, %d, %s",
			r.Guest, r.Received, r.Lost, r.LargestGap.Length, calm.Received, calm.Lost, calm.LargestGap.Length)
		if r.Lost > calm.Lost || r.Restarts != 0 || r.Received == 0 || calm.Received == 0 {
			b.t.Errorf("guest %s felt it: %+v; without livepatches: %+v", r.Guest, r, calm)
		}
	}
	for _, one := range all {
		b.t.Log(one)
	}
}

// figures tells how long a livepatch takes, by turns with belay-kernel as it is and with one that
// is yet to be started. It judges nothing: an emulated host takes as long as it takes.
func (b *patchBed) figures() {
	const rounds = 7
	all := map[bool][]taken{}
	for i := range 2 * rounds {
		ended := i%2 == 1
		if ended {
			b.script("pkill -x belay-kernel; while pgrep -x belay-kernel >&2; do sleep .2; done")
		}
		one := b.timed(livepatch.Fix1)
		b.t.Logf("belay-kernel ended before: %t: %s", ended, one)
		all[ended] = append(all[ended], one)
		b.must("revert", livepatch.Fix1)
	}
	for ended, list := range all {
		slices.SortFunc(list, func(a, b taken) int { return cmp.Compare(a.beyond(), b.beyond()) })
		b.t.Logf("belay-kernel ended before: %t: median of %d, by what it took beyond the target: %s", ended, len(list), list[len(list)/2])
	}
}

// since is how guests' heartbeats went since a mark.
func (b *patchBed) since(m observer.Mark, guests []string) (reports []observer.Report) {
	for _, g := range guests {
		reports = append(reports, b.obs.Since(m, g))
	}
	return reports
}

// belayText is what belay prints for people, where it is to end with a code.
func (b *patchBed) belayText(code int, args ...string) string {
	b.t.Helper()
	r, err := b.h.Belay(b.ctx(2*time.Minute), args...)
	if err != nil {
		b.t.Fatal(err)
	}
	if r.Code != code {
		b.t.Fatalf("belay %s: exit code %d, want %d:\n%s%s", strings.Join(args, " "), r.Code, code, r.Stdout, r.Stderr)
	}
	return r.Stdout + r.Stderr
}

// taken is how long a livepatch took: Verified from the start of 'belay patch apply' until
// belayd had seen that every task runs it, Kernel of that the kernel itself, from being
// enabled to the end of its transition.
type taken struct{ Verified, Kernel time.Duration }

// String has it beside what is asked for: the kernel's own time half again, and half a second.
func (t taken) String() string {
	return fmt.Sprintf("verified after %s, of which the kernel took %s; at most %s is asked for",
		t.Verified.Round(time.Millisecond), t.Kernel.Round(time.Millisecond), t.target().Round(time.Millisecond))
}

func (t taken) target() time.Duration { return t.Kernel*3/2 + 500*time.Millisecond }

// beyond is how much longer it took, below 0 if it did not.
func (t taken) beyond() time.Duration { return t.Verified - t.target() }

// timed applies a livepatch, by the clock of the host.
func (b *patchBed) timed(name string) taken {
	b.t.Helper()
	before, text, _ := strings.Cut(b.script("date +%s%N; belay -o json patch apply "+b.signed(name)), "\n")
	start, err := strconv.ParseInt(before, 10, 64)
	var op maint.Op
	if err == nil {
		err = json.Unmarshal([]byte(text), &op)
	}
	if err != nil {
		b.t.Fatal(err)
	}
	for _, step := range op.Steps {
		b.t.Logf("%s: %s began %s after the command, and took %s", name, step.Name,
			step.Started.Sub(time.Unix(0, start)).Round(time.Millisecond), step.Ended.Sub(step.Started).Round(time.Millisecond))
	}
	log := b.script("dmesg | grep \"livepatch: .*'" + name + "'\" | tail -n 3")
	at := func(what string) time.Duration {
		m := regexp.MustCompile(`\[ *([0-9.]+)\] livepatch: .*` + what).FindStringSubmatch(log)
		if m == nil {
			b.t.Fatalf("the kernel's log of %s has no %q:\n%s", name, what, log)
		}
		s, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			b.t.Fatal(err)
		}
		return time.Duration(s * float64(time.Second))
	}
	return taken{stepOf(b.t, op, "load").Ended.Sub(time.Unix(0, start)), at("patching complete") - at("enabling patch")}
}

// components: what guests do not touch is restarted, and they do not feel it.
func (b *patchBed) components(guests []string) {
	for _, c := range []struct {
		args   []string
		unseen bool // a pause would not have been
	}{
		{[]string{"restart", "libvirtd.service"}, true},
		{[]string{"restart", "--reload", "virtlogd.service"}, false},
		{[]string{"restart", "belayd.service"}, true},
	} {
		pids := b.script("cat /run/libvirt/qemu/web-*.pid")
		mark := b.obs.Mark()
		op := b.must(c.args...)
		for i, r := range b.since(mark, guests) {
			b.t.Logf("%s: guest %s: %d heartbeats, %d lost, longest gap %s", c.args, guests[i], r.Received, r.Lost, r.LargestGap.Length)
			if r.Lost != 0 || r.Restarts != 0 || r.Received == 0 {
				b.t.Errorf("guest %s felt that: %+v", guests[i], r)
			}
		}
		if p := op.Patched; p == nil || len(p.Guests) != len(guests) || p.Unwatched != c.unseen {
			b.t.Errorf("%s: the record has %+v", c.args, p)
		}
		if now := b.script("cat /run/libvirt/qemu/web-*.pid"); now != pids {
			b.t.Errorf("%s: QEMU processes %q, were %q", c.args, now, pids)
		}
	}
	op, code := b.patch("restart", "virtlogd.service")
	b.refused(op, code, maint.CodeComponent, "lose their logs")
	op, code = b.patch("restart", "ssh.service")
	b.refused(op, code, maint.CodeComponent, "not listed")
}

// microcode: Debian's kernel loads none late.
func (b *patchBed) microcode() {
	if b.script("[ ! -e /sys/devices/system/cpu/microcode/reload ] || echo there") != "" {
		b.t.Skip("this kernel loads microcode late")
	}
	op, code := b.patch("microcode")
	b.refused(op, code, maint.CodeNeedsReboot, "rung B3 or D")
}

// alive: after all that the guests are as they were, with the memory that they had.
func (b *patchBed) alive(guests []string) {
	status, mem := b.look(b.h)
	if status.BootID != b.first.BootID || !mem.OK() || mem.FixedChecksum != b.mem.FixedChecksum {
		b.t.Errorf("%+v, %+v; was %+v, %+v", status, mem, b.first, b.mem)
	}
	for _, g := range guests {
		if err := b.obs.Await(b.ctx(time.Minute), g, 20); err != nil {
			b.t.Error(err)
		}
	}
}

// warns: a livepatch that has the kernel warn in the soak is taken back, and the one before
// is active again.
func (b *patchBed) warns() {
	b.begin(livepatch.Fix1)
	op, code := b.read(livepatch.Warn)
	b.failed(op, code, maint.CodeUnwell, "WARNING")
	b.has(livepatch.Fix1)
}

// oops: as warns, after which this kernel is not patched any more.
func (b *patchBed) oops() {
	b.begin(livepatch.Fix1)
	op, code := b.read(livepatch.Oops)
	b.failed(op, code, maint.CodeUnwell, "this host's kernel")
	b.has(livepatch.Fix1)
	op, code = b.patch("apply", b.signed(livepatch.Fix2))
	b.refused(op, code, maint.CodeTainted, "tainted")
	b.has(livepatch.Fix1)
}

// read applies a livepatch, and reads /proc/version as soon as every task runs it.
func (b *patchBed) read(name string) (op maint.Op, code int) {
	b.t.Helper()
	file := b.signed(name)
	read := make(chan error, 1)
	go func() {
		_, err := b.h.Script(b.ctx(2*time.Minute), fmt.Sprintf(`until %s; do sleep .2; done 2>/dev/null
cat /proc/version || true`, whole(name)))
		read <- err
	}()
	op, code = b.patch("apply", file)
	if err := <-read; err != nil {
		b.t.Error(err)
	}
	return op, code
}

// stalls: a transition that a kernel thread holds up is turned round, and whom it waited for
// is named, beforehand, meanwhile and afterwards.
func (b *patchBed) stalls() {
	const thread, function = livepatch.Sleeper, "belay_sleeper_wait"
	b.begin(livepatch.Fix1)
	b.script("insmod " + b.module(livepatch.Sleeper))
	defer b.script("rmmod " + livepatch.Sleeper + " 2>/dev/null || true")
	stall := b.signed(livepatch.Stall)
	if text := b.belayText(0, "patch", "inspect", stall); !strings.Contains(text, "may wait for") || !strings.Contains(text, thread) {
		b.t.Errorf("it is not forecast whom it will wait for:\n%s", text)
	}
	begin := time.Now()
	id := strings.TrimSpace(b.belayText(0, "patch", "apply", "--detach", stall))
	client, ctx := b.h.Client(), b.ctx(4*time.Minute)
	for {
		v := b.view()
		if i := slices.IndexFunc(v.Waiting, func(t maint.KernelTask) bool { return t.Comm == thread }); i >= 0 {
			if w := v.Waiting[i]; !w.Kernel || w.Function != function || len(w.Stack) == 0 {
				b.t.Errorf("it waits for %+v", w)
			}
			break
		}
		if op, err := client.Op(ctx, maint.OpID(id)); err != nil || op.State == maint.OpEnded {
			b.t.Fatalf("nobody was seen to hold it up: %+v, %v", op, err)
		}
	}
	if r, err := b.h.Belay(ctx, "patch", "apply", b.signed(livepatch.Fix2)); err != nil || r.Code != 3 || !strings.Contains(r.Stderr, id) {
		b.t.Errorf("while one is being loaded another is: %+v, %v", r, err)
	}
	// It goes on until the transition has come to an end, whichever.
	r, err := b.h.Belay(ctx, "patch", "watch")
	if err != nil || r.Code != 0 || !strings.Contains(r.Stderr, thread) || !strings.Contains(r.Stderr, function) {
		b.t.Errorf("belay patch watch: %+v, %v", r, err)
	}
	op, err := client.Watch(ctx, maint.OpID(id), func(maint.Op) {})
	if err != nil {
		b.t.Fatal(err)
	}
	b.failed(op, 1, maint.CodeStalled, "kernel thread "+thread)
	b.failed(op, 1, maint.CodeStalled, function)
	if took := op.Ended.Sub(op.Started); took < 60*time.Second || took > 90*time.Second {
		b.t.Errorf("it was given up after %s", took)
	}
	if notes := strings.Join(stepOf(b.t, op, "load").Notes, "\n"); !strings.Contains(notes, thread) {
		b.t.Errorf("whom it waited for is not among the notes: %q", notes)
	}
	b.t.Logf("turned round %s after it was asked for: %v", time.Since(begin).Round(time.Second), op.Problems)
	b.script("rmmod " + livepatch.Sleeper)
	b.has(livepatch.Fix1)
}
