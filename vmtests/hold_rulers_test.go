package vmtests

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/vmtests/cluster"
	"belay/vmtests/guest"
	"belay/vmtests/lab"
	"belay/vmtests/observer"
)

// The rulers of this file do not ask belayd: they look at processes, locks,
// heartbeats, libvirt and what a step has written.

// comms of the processes that a hold has beside belayd.
const (
	leashComm = "belay-leash"
	stepComm  = "belay-step"
)

// processes are the living ones of a name on the host.
func (w *ward) processes(comm string) (pids []int) {
	w.t.Helper()
	here, err := os.Readlink(filepath.Join(filepath.Dir(w.Root()), "ns/net"))
	if err != nil {
		w.t.Error(err)
		return nil
	}
	all, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		w.t.Error(err)
	}
	for _, dir := range all {
		b, err := os.ReadFile(filepath.Join(dir, "stat"))
		if err != nil {
			continue // it has ended
		}
		stat := string(b) // PID (COMM) STATE ...
		open, shut := strings.Index(stat, "("), strings.LastIndex(stat, ")")
		if stat[open+1:shut] != comm || stat[shut+2] == 'Z' {
			continue
		}
		if net, err := os.Readlink(filepath.Join(dir, "ns/net")); err == nil && net == here {
			pid, _ := strconv.Atoi(filepath.Base(dir))
			pids = append(pids, pid)
		}
	}
	return pids
}

// pid is the process of a guest.
func (w *ward) pid(name string) int {
	w.t.Helper()
	text, err := os.ReadFile(w.Path("/run/libvirt/qemu/" + name + ".pid"))
	if err != nil {
		w.t.Error(err)
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		w.t.Error(err)
	}
	return pid
}

// leases counts the locks that virtlockd holds on a guest's disk: one when the
// guest has its lease.
func (w *ward) leases(g *guest.Guest) (n int) {
	w.t.Helper()
	virtlockd, err := w.DaemonPID(lab.Virtlockd)
	if err != nil || virtlockd == 0 {
		w.t.Errorf("virtlockd has gone: %v", err)
		return 0
	}
	st, err := os.Stat(g.Spec.Disk)
	if err != nil {
		w.t.Error(err)
		return 0
	}
	locks, err := os.ReadFile("/proc/locks")
	if err != nil {
		w.t.Error(err)
	}
	inode := fmt.Sprintf(":%d", st.Sys().(*syscall.Stat_t).Ino)
	for line := range strings.Lines(string(locks)) {
		// 1: POSIX  ADVISORY  WRITE 1234 fe:00:5678 0 0
		f := strings.Fields(line)
		if len(f) > 5 && f[1] == "POSIX" && f[3] == "WRITE" && f[4] == strconv.Itoa(virtlockd) && strings.HasSuffix(f[5], inode) {
			n++
		}
	}
	return n
}

// amiss is what is not so of what must be when no hold is: every guest runs, in
// the QEMU that it had first, with its lease; the one that somebody else has
// paused is as it was; nothing of a hold is left.
func (w *ward) amiss(ctx context.Context, first map[string]int) (wrong []string) {
	say := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	for _, g := range w.guests {
		name := g.Spec.Name
		out, err := w.Virsh(ctx, "domstate", name)
		if out = strings.TrimSpace(out); err != nil || out != "running" {
			say("%s is %q %v", name, out, err)
		}
		if pid := w.pid(name); pid != first[name] {
			say("%s is in process %d, was in %d", name, pid, first[name])
		}
		if n := w.leases(g); n != 1 {
			say("%d leases of %s's disk are held", n, name)
		}
	}
	if got := w.state(ctx, theirs); got != "paused (user)" || w.pid(theirs) != first[theirs] {
		say("the guest that somebody else had paused is %s, in process %d", got, w.pid(theirs))
	}
	for _, comm := range []string{leashComm, stepComm} {
		if pids := w.processes(comm); len(pids) > 0 {
			say("there is %s, process %v", comm, pids)
		}
	}
	for _, dir := range []string{"leash", "steps"} {
		left, err := os.ReadDir(w.Path("/run/belay/" + dir))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			say("%v", err)
		}
		if len(left) > 0 {
			say("there is %s/%s", dir, left[0].Name())
		}
	}
	return wrong
}

// settled waits until nothing is wrong any more, and gives what is wrong when
// the time is up.
func (w *ward) settled(ctx context.Context, first map[string]int, within time.Duration) (wrong []string) {
	for end := time.Now().Add(within); ; {
		wrong = w.amiss(ctx, first)
		if len(wrong) == 0 || time.Now().After(end) || ctx.Err() != nil {
			return wrong
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// leashLog is what the leashes of an operation have logged, by message.
func (w *ward) leashLog(op maint.OpID, msg string) (lines []string) {
	w.t.Helper()
	b, err := os.ReadFile(w.LogFile())
	if err != nil {
		w.t.Error(err)
	}
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, "op="+string(op)+" ") && strings.Contains(line, msg) {
			lines = append(lines, line)
		}
	}
	return lines
}

// logOf is all that belayd and the leashes said of an operation.
func (w *ward) logOf(op maint.OpID) string {
	b, _ := os.ReadFile(w.LogFile())
	var all strings.Builder
	for line := range strings.Lines(string(b)) {
		if op == "" || strings.Contains(line, string(op)) {
			all.WriteString(line)
		}
	}
	return all.String()
}

// trail is a file in which steps leave what they have done, a word a line.
type trail string

func (p trail) words() []string {
	b, err := os.ReadFile(string(p))
	if err != nil {
		return nil
	}
	return strings.Fields(string(b))
}

// lies are what an ended operation's record says that is not so.
func (w *ward) lies(op maint.Op, p trail) (lies []string) {
	say := func(format string, args ...any) { lies = append(lies, fmt.Sprintf(format, args...)) }
	did := p.words()
	begun, done, undone := slices.Contains(did, "begin"), slices.Contains(did, "end"), slices.Contains(did, "undo")
	if op.State != maint.OpEnded {
		say("it has not ended")
	}
	held := op.Held
	if held == nil {
		held = new(maint.HoldResult)
	}
	// A step that was ended before its first word may have been begun.
	if begun && held.Step == nil || held.Step != nil && held.Step.OK() != done {
		say("the step: %+v, but it did %v", held.Step, did)
	}
	if (held.Undo != nil && held.Undo.OK()) != undone {
		say("the undo: %+v, but it did %v", held.Undo, did)
	}
	switch op.Outcome {
	case maint.OutcomeDone, maint.OutcomePartly:
		if !done || undone {
			say("%s, but it did %v", op.Outcome, did)
		}
	case maint.OutcomeBlocked:
		if len(did) > 0 {
			say("blocked, but it did %v", did)
		}
	case maint.OutcomeFailed, maint.OutcomeAborted:
		if begun && (!undone || did[len(did)-1] != "undo") {
			say("%s, but it did %v", op.Outcome, did)
		}
	default:
		say("outcome %q", op.Outcome)
	}
	if op.Outcome != maint.OutcomeDone && len(op.Problems) == 0 {
		say("%s without a reason", op.Outcome)
	}
	fired := slices.ContainsFunc(op.Leash, func(e maint.LeashEvent) bool { return e.Kind == maint.LeashFired })
	if logged := w.leashLog(op.ID, `msg="releasing guests that belayd has paused"`); fired != (len(logged) > 0) {
		say("that the leash fired: %t, it logged: %q", fired, logged)
	}
	for _, g := range held.Guests {
		logged := w.leashLog(op.ID, `msg="guest released" op=`+string(op.ID)+" guest="+g.Guest)
		if (g.ReleasedBy == "leash") != (len(logged) > 0) && g.ReleasedBy != "belayd" {
			say("%s was released by %q, the leash logged %q", g.Guest, g.ReleasedBy, logged)
		}
	}
	return lies
}

// trial is one belay hold with the rulers applied.
type trial struct {
	*ward
	first map[string]int           // the QEMUs before it
	clock map[string]time.Duration // how far the guests' were ahead
	trail trail
	begun time.Time
	mark  observer.Mark
	known maint.OpID // the newest operation before it
	late  func() time.Duration

	op     maint.Op // as it ended; none if belayd died before it had one
	result cluster.Result
	noise  time.Duration // by how much this machine let sleepers sleep too long
	gap    time.Duration // the longest standstill of a guest
}

// stale is how far a guest's clock may be off after a hold, by heartbeats.
const stale = 250 * time.Millisecond

// try readies the rulers.
func (w *ward) try(ctx context.Context, name string) *trial {
	w.t.Helper()
	e := &trial{ward: w, first: map[string]int{theirs: w.pid(theirs)}, clock: make(map[string]time.Duration), trail: trail(filepath.Join(w.Dir, "trail-"+name))}
	for _, g := range w.guests {
		e.first[g.Spec.Name] = w.pid(g.Spec.Name)
	}
	ops, err := w.Client().Ops(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	if len(ops) > 0 {
		e.known = ops[len(ops)-1].ID
	}
	for _, g := range w.guests {
		r, err := w.since(ctx, w.obs.Mark(), g.Spec.Name)
		if err != nil {
			w.t.Fatal(err)
		}
		e.clock[g.Spec.Name] = r.ClockAfter.Value
	}
	e.begun, e.mark, e.late = time.Now(), w.obs.Mark(), lateness()
	return e
}

// hold runs belay hold, and returns when it has ended.
func (e *trial) hold(ctx context.Context, args ...string) {
	var err error
	if e.result, err = e.Belay(ctx, append([]string{"hold"}, args...)...); err != nil {
		e.result.Stderr = err.Error()
	}
}

// end waits for the operation's end. belayd must be back.
func (e *trial) end(ctx context.Context) {
	e.t.Helper()
	e.noise = e.late()
	ops, err := e.Client().Ops(ctx)
	if err != nil {
		e.t.Fatal(err)
	}
	if len(ops) == 0 || ops[len(ops)-1].ID == e.known {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	if e.op, err = e.Client().Watch(ctx, ops[len(ops)-1].ID, func(maint.Op) {}); err != nil {
		e.t.Fatalf("the operation does not end: %v\n%s", err, e.logOf(""))
	}
}

// fired reports whether the leash did.
func (e *trial) fired() bool {
	return slices.ContainsFunc(e.op.Leash, func(ev maint.LeashEvent) bool { return ev.Kind == maint.LeashFired })
}

// ways counts by which way the leash released guests.
func (e *trial) ways() map[string]int {
	by := make(map[string]int)
	for _, ev := range e.op.Leash {
		if ev.Kind == maint.LeashReleased {
			by[ev.Way]++
		}
	}
	return by
}

// wrong is all that is not as it must be after a hold, which may take a while to
// become so; limit is how long the guest of a report may have stood still.
func (e *trial) wrong(ctx context.Context, limit func(observer.Gap) time.Duration) (wrong []string) {
	say := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	// A leash whose belayd died before it had an order ends after 30 s.
	wrong = append(wrong, e.settled(ctx, e.first, 2*time.Minute)...)
	if e.op.ID == "" {
		if e.result.Code == 0 || len(e.trail.words()) > 0 {
			say("there is no operation, and it did %v", e.trail.words())
		}
	} else {
		wrong = append(wrong, e.lies(e.op, e.trail)...)
		// Who could not learn how it ended must not be told that all is well.
		if want := exitCode(e.op); e.result.Code != want && (e.result.Code == 0 || !strings.Contains(e.result.Stderr, "belayd")) {
			say("belay ended with %d, not %d", e.result.Code, want)
		}
	}
	for _, g := range e.guests {
		name := g.Spec.Name
		r, err := e.since(ctx, e.mark, name)
		if err != nil || r.Restarts > 0 {
			say("heartbeats of %s: %+v %v", name, r, err)
		}
		stood := stoodStill(r)
		e.gap = max(e.gap, stood)
		if most := limit(r.LargestGap); stood > most+e.noise {
			say("%s stood still for %s, longer than %s (and %s of noise)", name, stood, most, e.noise)
		}
		var told maint.HeldGuest
		if e.op.Held != nil {
			if i := slices.IndexFunc(e.op.Held.Guests, func(h maint.HeldGuest) bool { return h.Guest == name }); i >= 0 {
				told = e.op.Held.Guests[i]
			} else if e.op.Outcome != maint.OutcomeBlocked {
				say("%s is not told of", name)
			}
		}
		off, lost := r.ClockAfter.Value, e.clock[name]-r.ClockAfter.Value
		if told.Clock == nil && lost > stale+e.noise || told.Clock != nil && told.Clock.State == maint.ClockSynchronised && off.Abs() > stale+e.noise {
			say("%s's clock is off by %s, was by %s, and is said to be %+v", name, off, e.clock[name], told.Clock)
		}
		d := (told.Pause - stood).Abs()
		if told.AtMost {
			d = stood - told.Pause
		}
		if told.Pause > 0 && d > 500*time.Millisecond+e.noise {
			say("%s stood still for %s, and is said to have for %s", name, stood, told.Pause)
		}
		if told.Left != "" && stood > time.Second+e.noise {
			say("%s stood still for %s, and is said not to have been paused: %s", name, stood, told.Left)
		}
	}
	return wrong
}

// stoodStill is how long a guest's vCPUs stood at a stretch, at most. One that only
// wants for CPU sends no heartbeats either, but its clock goes on.
func stoodStill(r observer.Report) time.Duration {
	if r.LargestGap.Open || r.LargestGap.Reboot {
		return r.LargestGap.Length
	}
	if starved := r.LargestGap.Length - r.Standstill; starved > 50*time.Millisecond && (r.Standstill-acpiPMWraps).Abs() < 2*time.Millisecond {
		return 0
	}
	return max(0, min(r.LargestGap.Length, r.Standstill))
}

// acpiPMWraps is after how long the clock of the guests begins anew: acpi_pm has 24 bits
// and 3.579545 MHz. One that gets no CPU for as long misses that, and loses so much.
const acpiPMWraps = (1 << 24) * time.Second / 3579545

// clocks is what is said of the guests' clocks, and what heartbeats say: "web-1
// -1s→0.2ms (0.3ms)".
func (e *trial) clocks() string {
	var all []string
	for _, g := range e.guests {
		before, after, state := "-", "-", "not told of"
		if e.op.Held != nil {
			for _, h := range e.op.Held.Guests {
				if h.Guest != g.Spec.Name || h.Clock == nil {
					continue
				}
				state = string(h.Clock.State)
				if h.Clock.Before != nil {
					before = h.Clock.Before.Offset.Round(100 * time.Microsecond).String()
				}
				if h.Clock.After != nil {
					after = h.Clock.After.Offset.Round(100 * time.Microsecond).String()
				}
			}
		}
		r := e.obs.Since(e.mark, g.Spec.Name)
		all = append(all, fmt.Sprintf("%s %s %s→%s (%s)", g.Spec.Name, state, before, after, r.ClockAfter.Value.Round(100*time.Microsecond)))
	}
	return "clocks " + strings.Join(all, ", ")
}

// everything is what there is to know when something is wrong.
func (e *trial) everything(wrong []string) string {
	return fmt.Sprintf("\n  %s\nbelay ended with %d: %s\n%s\n%s", strings.Join(wrong, "\n  "), e.result.Code, e.result.Stderr, indent(e.op), e.logOf(e.op.ID))
}

// exitCode is what belay hold ends with for an operation that has ended.
func exitCode(op maint.Op) int {
	if op.Held != nil && op.Held.Step != nil && op.Held.Step.ExitCode > 0 {
		return op.Held.Step.ExitCode
	}
	switch op.Outcome {
	case maint.OutcomeDone:
		return 0
	case maint.OutcomeBlocked:
		return 3
	case maint.OutcomePartly:
		return 4
	}
	return 1
}

// since reports on a guest's heartbeats when it is known to send them again.
func (w *ward) since(ctx context.Context, m observer.Mark, name string) (observer.Report, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	err := w.obs.Await(ctx, name, 3)
	return w.obs.Since(m, name), err
}

// lateness measures by how much this machine lets a sleeper sleep too long,
// until stop is called.
func lateness() (stop func() time.Duration) {
	const nap = 10 * time.Millisecond
	end, most := make(chan struct{}), make(chan time.Duration)
	go func() {
		worst := time.Duration(0)
		for {
			before := time.Now()
			select {
			case <-time.After(nap):
				worst = max(worst, time.Since(before)-nap)
			case <-end:
				most <- worst
				return
			}
		}
	}()
	return func() time.Duration { close(end); return <-most }
}

// indent is v for people.
func indent(v any) string {
	b, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		return err.Error()
	}
	return string(b)
}

func TestStoodStill(t *testing.T) {
	for _, test := range []struct{ gap, standstill, want time.Duration }{
		{1050 * time.Millisecond, 1040 * time.Millisecond, 1040 * time.Millisecond},
		{1040 * time.Millisecond, 1050 * time.Millisecond, 1040 * time.Millisecond},
		{800 * time.Millisecond, -time.Millisecond, 0},                   // wanted for CPU
		{5200 * time.Millisecond, acpiPMWraps - 100*time.Microsecond, 0}, // and for so long
		{acpiPMWraps + 9*time.Millisecond, acpiPMWraps, acpiPMWraps},     // was paused for as long
		{5200 * time.Millisecond, 5190 * time.Millisecond, 5190 * time.Millisecond},
	} {
		if got := stoodStill(observer.Report{LargestGap: observer.Gap{Length: test.gap}, Standstill: test.standstill}); got != test.want {
			t.Errorf("gap %v, standstill %v: %v, want %v", test.gap, test.standstill, got, test.want)
		}
	}
}
