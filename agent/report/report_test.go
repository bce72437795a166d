package report

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"

	"belay/agent/maint"
)

var update = flag.Bool("update", false, "write the reports into testdata instead of comparing them")

// at is a moment of the operations here, some milliseconds after they began.
func at(ms int) time.Time {
	return time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC).Add(time.Duration(ms) * time.Millisecond)
}

func ms(n float64) time.Duration { return time.Duration(n * float64(time.Millisecond)) }

func data(v any) json.RawMessage {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

// ran are the records of steps that were done one after the other, each for 100 ms.
func ran(steps ...string) (recs []maint.Record, done []maint.Step) {
	recs = []maint.Record{{Time: at(0), Kind: maint.RecAccepted}}
	for i, name := range steps {
		recs = append(recs, maint.Record{Time: at(100 * i), Kind: maint.RecStepStart, Step: name}, maint.Record{Time: at(100*i + 100), Kind: maint.RecStepDone, Step: name})
		done = append(done, maint.Step{Name: name, Status: "done", Started: at(100 * i), Ended: at(100*i + 100)})
	}
	return append(recs, maint.Record{Time: at(100 * len(steps)), Kind: maint.RecEnded}), done
}

func begun(id maint.OpID, kind maint.OpKind) maint.Op {
	return maint.Op{ID: id, Kind: kind, By: "root", Reason: "firmware", Started: at(0), State: maint.OpEnded, Outcome: maint.OutcomeDone, Ended: at(500)}
}

func clock(before, after float64) *maint.ClockReport {
	return &maint.ClockReport{Guest: "web-1", State: maint.ClockSynchronised, Shots: 1,
		Before: &maint.ClockOffset{Offset: ms(before), Error: ms(4)}, After: &maint.ClockOffset{Offset: ms(after), Error: ms(2.5)}, Stale: ms(1200), StaleError: ms(3)}
}

func migration() Source {
	op := begun("mig-1", maint.OpMigrate)
	op.Guest, op.GuestUUID, op.Peer, op.Told = "web-1", "u1", "host-b", true
	op.Migrate = &maint.MigrateRequest{Guest: "web-1", To: "host-b", MaxPause: ms(300), BandwidthMiBs: 32, Allow: []maint.Means{maint.MeansSlow, maint.MeansPostCopy}}
	op.Move = &maint.MoveResult{From: "host-a", To: "host-b", Downtime: ms(41), Stopped: at(350), Copy: ms(240), Total: ms(500), MemorySent: 192 << 20, Iterations: 3,
		Disks: []maint.DiskCopy{{Target: "vda", Bytes: 20 << 30}}}
	op.HealthBefore = &maint.HealthReport{Check: "tcp 192.0.2.1:80", Healthy: true}
	op.Arrival = &maint.ArrivalReport{Clock: *clock(-44, 0.7), Health: &maint.HealthReport{Check: "tcp 192.0.2.1:80", Reason: "connection refused"}, Ports: []maint.ArrivedPort{{MAC: "52:54:00:00:00:01"}}}
	recs, steps := ran("announce", "preflight", "reserve", "perform", "verify")
	op.Steps = steps
	recs = append(recs, maint.Record{Time: at(320), Kind: maint.RecStepNote, Step: "perform", Text: "the copy does not get on: 40 MiB/s are sent and 60 MiB/s written; the guest is slowed down", Data: data("a secret")},
		maint.Record{Time: at(900), Kind: maint.RecSeenTo})
	return Source{Host: "host-a", Now: at(1000), Op: op, Records: recs,
		Events: []maint.ScheduledEvent{
			{Op: "mig-1", State: maint.EventCompleted, Guests: []maint.EventGuest{{Name: "web-1"}}, Announced: at(10), NotBefore: at(900010), Approval: &maint.EventApproval{By: "guest web-1", At: at(60)}, Started: at(200), Ended: at(500)},
			{Op: "another", Guests: []maint.EventGuest{{Name: "db-1"}}, Announced: at(10)}},
		Plan: &maint.Plan{Guests: []maint.PlannedGuest{{UUID: "u0"}, {UUID: "u1", Blackout: &maint.Estimate{Low: ms(20), Typical: ms(35), High: ms(80), From: "7 moves of this guest"}}}}}
}

func hold() Source {
	op := begun("hold-1", maint.OpHold)
	op.Outcome = maint.OutcomePartly
	op.Hold = &maint.HoldRequest{All: true, MaxPause: ms(500), Step: maint.HostStep{Command: []string{"sh", "-c", "ip link set br0 down"}}, Groups: [][]string{{"dns-1"}, {"web-1"}}}
	problem := maint.Problemf(maint.CodePauseTooLong, "guest web-1", "see what libvirt did", "was paused for 512ms, longer than the 500ms allowed")
	op.Held = &maint.HoldResult{Guests: []maint.HeldGuest{
		{Guest: "dns-1", UUID: "u0", Paused: at(110), Released: at(320), Pause: ms(210), AtMost: true, ReleasedBy: "leash", Clock: &maint.ClockReport{State: maint.ClockUnsynchronised, Reason: "it has no guest agent"}},
		{Guest: "web-1", UUID: "u1", Paused: at(111), Released: at(623), Pause: ms(512), ReleasedBy: "belayd", Clock: clock(-839.6, 0.669), Problem: problem},
		{Guest: "db-1", UUID: "u2", Left: "it is paused already"}},
		Step: &maint.StepRun{Started: at(120), Ended: at(300), ExitCode: 7}, Undo: &maint.StepRun{Started: at(300), Ended: at(310)}}
	op.Problems = []maint.Problem{*problem}
	var recs []maint.Record
	recs, op.Steps = ran("preflight", "hold", "verify")
	for _, e := range []maint.LeashEvent{{Time: at(105), Kind: maint.LeashArmed}, {Time: at(130), Kind: maint.LeashRenewed, Count: 4}, {Time: at(315), Kind: maint.LeashFired},
		{Time: at(320), Kind: maint.LeashReleased, Guest: "dns-1", Way: "monitor"}, {Time: at(630), Kind: maint.LeashDisarmed}} {
		recs = append(recs, maint.Record{Time: at(640), Kind: maint.RecLeash, Data: data(e)})
	}
	return Source{Host: "host-a", Now: at(1000), Op: op, Records: recs}
}

func replacement() Source {
	op := begun("vmm-1", maint.OpReplace)
	op.Guest, op.GuestUUID = "web-1", "u1"
	op.Replace = &maint.ReplaceRequest{Guest: "web-1", MaxPause: ms(2000), Emergency: "CVE-2026-1"}
	op.Replaced = &maint.VMMResult{Guest: "web-1", UUID: "u1", Method: maint.VMMInPlace, OldQEMU: "7.2.9", NewQEMU: "10.0.2", Pause: ms(720), Pauses: 2, Total: ms(900), Attempts: 2, Clock: clock(-720, 1),
		Choices: []maint.VMMChoice{{Method: maint.VMMPrewarmed, Problems: []maint.Problem{*maint.Problemf(maint.CodeMemory, "guest web-1", "", "its memory is its process's own")}},
			{Method: maint.VMMInPlace, Pause: ms(600), MemoryBytes: 12 << 20}, {Method: maint.VMMCopy, Pause: ms(3000), MemoryBytes: 2 << 30}}}
	recs, steps := ran("plan", "prove", "swap")
	op.Steps = steps
	return Source{Host: "host-a", Now: at(1000), Op: op, Records: recs}
}

func drain() Source {
	op := begun("drain-1", maint.OpDrain)
	op.Outcome = maint.OutcomePartly
	op.Drain = &maint.DrainRequest{Allow: []maint.Means{}}
	left := maint.GuestMove{Guest: "db-1", GuestUUID: "u2", MemoryBytes: 8 << 30, State: maint.MoveLeft, Tries: 1,
		Problems: []maint.Problem{*maint.Problemf(maint.CodeHostDevice, "guest db-1", "detach it", "has PCI device 0000:3b:00.1")}}
	moved := maint.GuestMove{Guest: "web-1", GuestUUID: "u1", MemoryBytes: 2 << 30, Peer: "host-b", State: maint.MoveMoved, Op: "mig-1", Downtime: ms(41), AntiAffinity: []string{"web"}}
	old := maint.GuestMove{Guest: "web-2", GuestUUID: "u3", MemoryBytes: 2 << 30, Peer: "host-c", State: maint.MoveMoved, Op: "mig-2"} // of a Belay that kept no downtime
	op.Moves = []maint.GuestMove{moved, old, left}
	op.Problems = left.Problems
	recs, steps := ran("plan", "cordon", "evacuate", "account")
	op.Steps = steps
	moving := moved
	moving.State = maint.MoveMoving
	recs = append(recs, maint.Record{Time: at(210), Kind: maint.RecMove, Data: data(moving)}, maint.Record{Time: at(250), Kind: maint.RecMove, Data: data(moved)},
		maint.Record{Time: at(260), Kind: maint.RecMove, Data: data(left)}, maint.Record{Time: at(50), Kind: maint.RecStepNote, Step: "plan", Text: "1 guests do not run, and stay defined here: old-1"})
	return Source{Host: "host-a", Now: at(1000), Op: op, Records: recs, Parts: []maint.Op{migration().Op}}
}

func restored() Source {
	op := begun("restore-1", maint.OpRestore)
	op.Restore = &maint.RestoreRequest{Drain: "drain-1"}
	op.Moves = []maint.GuestMove{{Guest: "web-1", GuestUUID: "u1", MemoryBytes: 2 << 30, Peer: "host-b", State: maint.MoveMoved, Op: "mig-7", Downtime: ms(38)},
		{Guest: "web-2", GuestUUID: "u3", MemoryBytes: 2 << 30, Peer: "host-c", State: maint.MoveLeft, Problems: []maint.Problem{*maint.Problemf(maint.CodeGuestOff, "guest web-2", "start it there", "is shut off on host-c")}}}
	recs, steps := ran("plan", "uncordon", "return", "account")
	op.Steps = steps
	return Source{Host: "host-a", Now: at(1000), Op: op, Records: recs, Arrived: []maint.Arrived{{Op: "mig-7", GuestUUID: "u1", Report: &maint.ArrivalReport{Clock: *clock(-41, 0.2)}}}}
}

func livepatch() Source {
	op := begun("patch-1", maint.OpPatch)
	op.Patch = &maint.PatchRequest{Action: maint.PatchApply, Name: "fix_2", File: "/root/fix_2.ko"}
	op.Patched = &maint.PatchResult{Name: "fix_2", Transition: ms(310), Soaked: 30 * time.Second, Replaced: "fix_1"}
	recs, steps := ran("preflight", "load", "soak")
	op.Steps = steps
	recs = append(recs, maint.Record{Time: at(150), Kind: maint.RecStepNote, Step: "load", Text: "after 10s the transition still waits for kworker/0:1 (120)"})
	return Source{Host: "host-a", Now: at(1000), Op: op, Records: recs}
}

func component() Source {
	op := begun("patch-2", maint.OpPatch)
	op.Patch = &maint.PatchRequest{Action: maint.PatchRestart, Name: "libvirtd.service"}
	op.Patched = &maint.PatchResult{Name: "libvirtd.service", Unwatched: true, Before: []maint.CPUMicrocode{{Revision: "0x1e"}, {CPU: 1, Revision: "0x1e"}}, After: []maint.CPUMicrocode{{Revision: "0x1f"}},
		Guests: []maint.GuestProof{{Guest: "web-1", UUID: "u1", QEMU: 4711, State: maint.GuestRunning},
			{Guest: "db-1", UUID: "u2", QEMU: 4712, State: maint.GuestRunning, Pauses: 1, Problem: maint.Problemf(maint.CodeGuestFelt, "guest db-1", "", "was paused meanwhile")}}}
	recs, steps := ran("preflight", "restart")
	op.Steps = steps
	return Source{Host: "host-a", Now: at(1000), Op: op, Records: recs}
}

func qemus() Source {
	op := begun("patch-3", maint.OpPatch)
	op.Outcome = maint.OutcomeFailed
	op.Patch = &maint.PatchRequest{Action: maint.PatchQEMU, Name: "slirp_fix", File: "/root/slirp_fix.so", All: true}
	refused := maint.Problemf(maint.CodeQEMURefused, "guest db-1", "", "ulp has not patched it")
	op.Problems = []maint.Problem{*refused}
	op.Patched = &maint.PatchResult{Name: "slirp_fix", QEMUs: []maint.PatchedQEMU{{Guest: "web-1", UUID: "u1", PID: 4711, Stopped: ms(31)},
		{Guest: "web-2", UUID: "u2", PID: 4712, Before: true, Applied: true}, {Guest: "off-1", UUID: "u3", PID: 4713, Gone: true},
		{Guest: "db-1", UUID: "u4", PID: 4714, Stopped: ms(12), Problem: refused}}}
	recs, steps := ran("preflight", "patch-qemu")
	op.Steps = steps
	return Source{Host: "host-a", Now: at(1000), Op: op, Records: recs}
}

func kernel() Source {
	op := begun("kexec-1", maint.OpKexec)
	op.Ended, op.Resumed, op.Outcome = at(95_000), 1, maint.OutcomePartly
	op.Kexec = &maint.KexecRequest{Kernel: "/boot/vmlinuz-6.12", Initrd: "/boot/initrd", All: true, Append: "root=/dev/vda1 quiet"}
	same, other := true, false
	op.Kexeced = &maint.KexecResult{Before: "6.1.0-41", After: "6.12.0-1", BootBefore: "b1", BootAfter: "b2", Guests: []maint.KexecGuest{
		{Guest: "web-1", UUID: "u1", Bytes: 2 << 30, Memory: maint.KexecInPlace, Fate: maint.KexecRestored, Pause: 38 * time.Second, Save: ms(2100), Check: ms(400), Restore: ms(1900), SameBoot: &same, Clock: clock(-38000, 2)},
		{Guest: "db-1", UUID: "u2", Fate: maint.KexecLost, Started: true, SameBoot: &other, Problem: maint.Problemf(maint.CodeLostGuest, "guest db-1", "", "is nowhere any more")},
		{Guest: "dns-1", UUID: "u3", Fate: maint.KexecRan}}}
	recs, steps := ran("preflight", "save")
	op.Steps = append(steps, maint.Step{Name: "boot", Status: "done", Started: at(200), Ended: at(90_000)})
	recs = append(recs, maint.Record{Time: at(40_000), Kind: maint.RecResumed})
	return Source{Host: "host-a", Now: at(100_000), Op: op, Records: recs}
}

// updated is an apply: one guest is moved, one is held, and one feels nothing.
func updated() Source {
	op := begun("apply-1", maint.OpApply)
	low := maint.RefusedRung{Rung: maint.RungA, Problems: []maint.Problem{*maint.Problemf(maint.CodeRung, "change ovs", "", "guests touch it")}}
	op.Apply = &maint.ApplyRequest{Plan: maint.Plan{Hash: "0123456789abcdef", Made: at(-60_000), Update: maint.Update{ID: "ovs-3", Description: "new Open vSwitch", Urgency: maint.UrgencySecurity},
		Changes: []maint.PlannedChange{{Change: "ovs", Kind: maint.ChangeService, Rung: maint.RungB1, Refused: []maint.RefusedRung{low}}},
		Guests: []maint.PlannedGuest{{Guest: "web-1", UUID: "u1", Rung: maint.RungD, To: "host-b", Blackout: &maint.Estimate{Low: ms(20), Typical: ms(35), High: ms(80)},
			Refused: []maint.RefusedRung{{Rung: maint.RungB1, Problems: []maint.Problem{*maint.Problemf(maint.CodePolicy, "guest web-1", "allow a longer pause", "may stand still for 100ms")}}}},
			{Guest: "dns-1", UUID: "u0", Rung: maint.RungB1, Pause: &maint.Estimate{Low: ms(300), Typical: ms(400), High: ms(600)}}, {Guest: "old-1", UUID: "u9", Rung: maint.RungA}}}}
	op.Moves = []maint.GuestMove{{Guest: "web-1", GuestUUID: "u1", MemoryBytes: 2 << 30, Peer: "host-b", State: maint.MoveMoved, Op: "mig-1", Downtime: ms(41)}}
	move, held := migration().Op, hold().Op
	held.ID, held.Held.Guests = "apply-1-step4", held.Held.Guests[:1]
	recs, steps := ran("1-check", "3-move", "4-hold", "account")
	op.Steps = steps
	return Source{Host: "host-a", Now: at(1000), Op: op, Records: recs, Parts: []maint.Op{move, held}}
}

// goingBack is a migration that was aborted and is not through with it.
func goingBack() Source {
	s := migration()
	s.Op.Move, s.Op.Arrival, s.Op.HealthBefore = nil, nil, nil
	s.Op.State, s.Op.Outcome, s.Op.Step, s.Op.Ended = maint.OpUndoing, maint.OutcomeAborted, "reserve", time.Time{}
	s.Op.Steps = []maint.Step{{Name: "reserve", Status: "undoing", Started: at(200), Ended: at(300)}, {Name: "perform", Status: "failed", Started: at(300), Ended: at(400), Error: "aborted on request"}}
	s.Records = []maint.Record{{Time: at(0), Kind: maint.RecAccepted}, {Time: at(300), Kind: maint.RecStepStart, Step: "perform"},
		{Time: at(350), Kind: maint.RecAbort, By: "cert:ops", Text: maint.AbortNow}, {Time: at(400), Kind: maint.RecStepFailed, Step: "perform", Text: "aborted on request"},
		{Time: at(401), Kind: maint.RecUndoStart, Step: "perform"}, {Time: at(420), Kind: maint.RecUndoDone, Step: "perform"}, {Time: at(421), Kind: maint.RecUndoStart, Step: "reserve"},
		{Time: at(450), Kind: maint.RecUndoFailed, Step: "reserve", Text: "peer host-b: cannot be reached"}}
	s.Events, s.Plan = nil, nil
	return s
}

var situations = map[string]func() Source{"migrate": migration, "hold": hold, "replace-vmm": replacement, "drain": drain, "restore": restored,
	"patch-apply": livepatch, "patch-restart": component, "patch-qemu": qemus, "kexec": kernel, "apply": updated, "going-back": goingBack}

func TestReports(t *testing.T) {
	t.Parallel()
	for name, source := range situations {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := Make(source())
			var b bytes.Buffer
			if err := Markdown(&b, r); err != nil {
				t.Fatal(err)
			}
			file := filepath.Join("testdata", name+".md")
			if *update {
				if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), b.String()); d != "" {
				t.Errorf("if it is right, go test ./agent/report -update:\n%s", d)
			}
			if strings.Contains(b.String(), "secret") {
				t.Error("it has what a step has written down for itself")
			}
		})
	}
}

// TestReportTravels: nothing is lost on the way to belay, and no list is null.
func TestReportTravels(t *testing.T) {
	t.Parallel()
	for name, source := range situations {
		r := Make(source())
		b, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		var back maint.Report
		if err := json.Unmarshal(b, &back); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(r, back); d != "" {
			t.Errorf("%s: %s", name, d)
		}
		if bytes.Contains(b, []byte(":null")) {
			t.Errorf("%s: null in %s", name, b)
		}
	}
}

// TestEveryKind: a new kind of operation needs its report.
func TestEveryKind(t *testing.T) {
	t.Parallel()
	seen := make(map[maint.OpKind]bool)
	for _, source := range situations {
		seen[source().Op.Kind] = true
	}
	for _, kind := range maint.OpKinds {
		if !seen[kind] {
			t.Errorf("no report of a %s is looked at", kind)
		}
	}
}

// TestNotBegun: whatever is not there yet, there is a report.
func TestNotBegun(t *testing.T) {
	t.Parallel()
	for name, source := range situations {
		s := source()
		op := s.Op
		s.Op = maint.Op{ID: op.ID, Kind: op.Kind, Started: op.Started, State: maint.OpRunning, Migrate: op.Migrate, Hold: op.Hold, Replace: op.Replace,
			Drain: op.Drain, Restore: op.Restore, Patch: op.Patch, Kexec: op.Kexec, Apply: op.Apply}
		s.Records, s.Events, s.Parts, s.Arrived = nil, nil, nil, nil
		r := Make(s)
		if r.Took != s.Now.Sub(op.Started) || Ending(r) != "running: " {
			t.Errorf("%s: %+v", name, r)
		}
		if err := Markdown(&bytes.Buffer{}, r); err != nil {
			t.Error(name, err)
		}
	}
}

// TestBareOperations: an operation of which only its kind is known has a report.
func TestBareOperations(t *testing.T) {
	t.Parallel()
	for _, kind := range append(maint.OpKinds, "of a later Belay") {
		r := Make(Source{Op: maint.Op{Kind: kind, Held: &maint.HoldResult{Guests: []maint.HeldGuest{{}}}, Kexeced: &maint.KexecResult{}, Patched: &maint.PatchResult{}, Moves: []maint.GuestMove{{}}},
			Records: []maint.Record{{Kind: maint.RecMove, Data: data("no move")}, {Kind: maint.RecLeash, Data: data(5)}, {Kind: "of a later Belay"}}})
		if err := Markdown(&bytes.Buffer{}, r); err != nil || r.What == "" {
			t.Errorf("%s: %q, %v", kind, r.What, err)
		}
	}
}

// TestNothingObeys: names come from elsewhere, and are text in Markdown and on a terminal.
func TestNothingObeys(t *testing.T) {
	t.Parallel()
	evil := "a|b`c`*d* <script>\x1b[2J\n# e [f](http://g) &lt; _h_ i_j ~~k~~ \u202e"
	s := hold()
	s.Op.Held.Guests[0].Guest, s.Op.Reason, s.Op.Held.Step.Error = evil, evil, evil
	s.Records = append(s.Records, maint.Record{Time: at(1), Kind: maint.RecStepNote, Step: evil, Text: evil})
	var b bytes.Buffer
	if err := Markdown(&b, Make(s)); err != nil {
		t.Fatal(err)
	}
	if strings.ContainsFunc(b.String(), func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) }) {
		t.Errorf("a terminal would obey %q", b.String())
	}
	const want = "a\\|b\\`c\\`\\*d\\* \\<script\\>\\\\u001b\\[2J\\\\u000a# e \\[f\\](http://g) \\&lt; \\_h\\_ i_j \\~\\~k\\~\\~ \\\\u202e"
	if got := strings.Count(b.String(), want); got < 4 {
		t.Errorf("it is not text in %s", b.String())
	}
	if strings.Contains(b.String(), "\n# e") {
		t.Error("it makes a heading")
	}
}
