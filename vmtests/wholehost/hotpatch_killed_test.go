package wholehost

import (
	"slices"
	"strings"
	"time"

	"belay/agent/maint"
	"belay/vmtests/livepatch"
)

// A moment in which belayd is killed: conditions of a shell, which come one after the other.
// A shell in the host looks for them without a pause; what it is killed in takes much longer.
type moment struct {
	name  string
	until []string
}

// disabled is that a livepatch which was there is on its way out, or has gone already;
// vanished that it has gone.
func disabled(name string) string {
	return vanished(name) + " || { read x </sys/kernel/livepatch/" + name + "/enabled && [ \"$x\" = 0 ]; }"
}

func vanished(name string) string { return "[ ! -e /sys/kernel/livepatch/" + name + " ]" }
func unloaded(name string) string { return "[ ! -e /sys/module/" + name + " ]" }
func loaded(name string) string   { return "[ -e /sys/module/" + name + " ]" }

// whole is that every task runs a livepatch. Before the kernel enables it, it is in no transition either.
func whole(name string) string {
	return "{ read x </sys/kernel/livepatch/" + name + "/enabled && [ \"$x\" = 1 ] && read x </sys/kernel/livepatch/" + name + "/transition && [ \"$x\" = 0 ]; }"
}

// killed: wherever belayd dies, its next start goes on or back, and the host is patched and
// recorded as such, or as it was.
func (b *patchBed) killed() {
	b.begin(livepatch.Fix1)
	now, next := livepatch.Fix1, livepatch.Fix2
	for i := range 5 {
		m := []moment{
			{"load: the kernel has it", []string{loaded(next)}},
			{"load: every task runs it", []string{loaded(next), whole(next)}},
			{"soak: the host's health is asked for", []string{"[ -e /run/asked ]"}},
			{"preflight: a copy is kept", []string{"set -- /var/lib/belay/live/" + next + "-*/patch.ko; [ -e \"$1\" ]"}},
			{"finish: the one before is unloaded", []string{loaded(next), unloaded(now)}},
		}[i]
		op, _ := b.killedAt(m, func() (maint.Op, int) { return b.patch("apply", b.signed(next)) })
		switch op.Outcome {
		case maint.OutcomeDone:
			now, next = next, now
		case maint.OutcomeFailed:
		default:
			b.t.Errorf("it has ended %s: %+v", op.Outcome, op.Problems)
		}
		b.has(now)
	}
	for _, m := range []moment{
		{"undo: it is being disabled", []string{loaded(livepatch.Warn), whole(livepatch.Warn), disabled(livepatch.Warn)}},
		{"undo: it has gone", []string{loaded(livepatch.Warn), whole(livepatch.Warn), vanished(livepatch.Warn)}},
		{"undo: the one before is back", []string{loaded(livepatch.Warn), whole(livepatch.Warn), unloaded(livepatch.Warn), loaded(now)}},
	} {
		op, code := b.killedAt(m, func() (maint.Op, int) { return b.read(livepatch.Warn) })
		b.failed(op, code, maint.CodeUnwell, "WARNING")
		b.has(now)
	}
	for _, m := range []moment{
		{"withdraw: it is being disabled", []string{disabled(now)}},
		{"withdraw: it has gone", []string{vanished(now)}},
		{"finish: it is unloaded", []string{unloaded(now)}},
	} {
		b.begin(now)
		if op, _ := b.killedAt(m, func() (maint.Op, int) { return b.patch("revert", now) }); op.Outcome != maint.OutcomeDone {
			b.t.Errorf("the revert has ended %s: %+v", op.Outcome, op.Problems)
		}
		b.has("")
	}
}

// killedAt does something in which belayd is killed.
func (b *patchBed) killedAt(m moment, do func() (maint.Op, int)) (op maint.Op, code int) {
	b.t.Helper()
	watch := "pid=$(systemctl show --property=MainPID --value belayd.service)\nrm -f /run/asked\ntouch /run/watching\n"
	for _, c := range m.until {
		watch += "until " + c + "; do :; done 2>/dev/null\n"
	}
	b.script("rm -f /run/watching")
	done := make(chan error, 1)
	go func() {
		_, err := b.h.Script(b.ctx(3*time.Minute), watch+"kill -KILL $pid")
		done <- err
	}()
	b.script("until [ -e /run/watching ]; do sleep .1; done")
	begin := time.Now()
	op, code = do()
	if err := <-done; err != nil {
		b.t.Fatalf("%s: belayd was not killed: %v", m.name, err)
	}
	b.script("until belay status >/dev/null 2>&1; do sleep .2; done")
	b.t.Logf("killed in %s: %s, taken up again %d times, in %s", m.name, op.Outcome, op.Resumed, time.Since(begin).Round(time.Second))
	return op, code
}

// boots: a host that went down while a livepatch was being loaded comes up without, until
// somebody says so; else what is active is loaded again, if the kernel's command line lets it.
func (b *patchBed) boots() {
	b.script("for guest in $(virsh list --name); do virsh destroy $guest; done >/dev/null")
	b.begin(livepatch.Fix1)
	second := b.signed(livepatch.Fix2)
	b.script("sync") // what was put there: belayd sees to its own
	id := maint.OpID(strings.TrimSpace(b.belayText(0, "patch", "apply", "--detach", second)))
	b.script("until [ -e /sys/kernel/livepatch/" + livepatch.Fix2 + " ]; do sleep .05; done")
	b.booted(func() error { return b.h.Reset(b.ctx(time.Minute)) })
	b.script(`until journalctl -b -u belayd.service | grep -q 'a livepatch is kept, and not loaded'; do sleep .5; done`)
	op, err := b.h.Client().Op(b.ctx(time.Minute), id)
	if err != nil {
		b.t.Fatal(err)
	}
	b.failed(op, 1, maint.CodeHostRebooted, "went down")
	b.hasNone(livepatch.Fix1, "the host went down while livepatch "+livepatch.Fix2)
	if text := b.belayText(0, "status"); !strings.Contains(text, "no livepatch is loaded by itself") {
		b.t.Errorf("belay status:\n%s", text)
	}
	b.must("reload")
	b.has(livepatch.Fix1)

	b.must("apply", b.signed(livepatch.Fix2))
	b.booted(func() error {
		b.script(`r=$(uname -r)
kexec -l /boot/vmlinuz-$r --initrd=/boot/initrd.img-$r --command-line="$(cat /proc/cmdline) belay.nolivepatch"
systemctl --no-block kexec`)
		return nil
	})
	b.script(`until journalctl -b -u belayd.service | grep -q 'a livepatch is kept, and not loaded'; do sleep .5; done`)
	b.hasNone(livepatch.Fix2, "belay.nolivepatch")

	b.booted(func() error { b.script("systemctl --no-block reboot"); return nil })
	for ctx := b.ctx(3 * time.Minute); ; {
		ops, err := b.h.Client().Ops(ctx)
		if ctx.Err() != nil {
			b.t.Fatalf("what was active is not loaded again: %+v, %v", ops, err)
		}
		if i := slices.IndexFunc(ops, func(op maint.Op) bool { return op.By == "boot" && op.State == maint.OpEnded }); i >= 0 {
			b.t.Logf("loaded again by %s: %s", ops[i].ID, ops[i].Outcome)
			break
		}
		time.Sleep(time.Second) // it is not told beforehand
	}
	b.has(livepatch.Fix2)
}

// booted has the host go down, and waits until it is up again.
func (b *patchBed) booted(how func() error) {
	b.t.Helper()
	begin := time.Now()
	b.again(b.h, how)
	b.awaitBelayd(b.h)
	b.t.Logf("up again after %s", time.Since(begin).Round(time.Second))
}

// hasNone checks that a livepatch is kept, and not loaded, and that it is told why.
func (b *patchBed) hasNone(kept, why string) {
	b.t.Helper()
	v := b.view()
	if v.Active == nil || v.Active.Name != kept || len(v.Loaded) != 0 || !strings.Contains(v.AutoOff, why) {
		b.t.Errorf("it shows %+v; want %s kept and not loaded: %s", v, kept, why)
	}
	if text := b.belayText(0, "patch", "list"); !strings.Contains(text, why) || !strings.Contains(text, "is not loaded") {
		b.t.Errorf("belay patch list:\n%s", text)
	}
	if text := b.script("cat /proc/version"); !strings.HasPrefix(text, unmended) {
		b.t.Errorf("/proc/version is %q", text)
	}
}
