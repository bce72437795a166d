package vmtests

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/vmtests/cluster"
	"belay/vmtests/guest"
	"belay/vmtests/measure"
	"belay/vmtests/updates"
)

// stroke is a moment of an apply at which belayd is killed: before a step has had any effect,
// while it has it, or after it; of doing the step, or of taking it back.
type stroke struct {
	update string
	bad    bool // the host is not well after it
	step   maint.PlanStepKind
	when   string // "before", "during", "after", or the same of "undoing"
}

func (s stroke) String() string {
	text := fmt.Sprintf("%s, %s %s", s.update, s.when, s.step)
	if s.bad {
		text += ", turning bad"
	}
	return text
}

// undoing reports whether the moment is one of taking the step back.
func (s stroke) undoing() bool { return strings.HasPrefix(s.when, "undoing") }

// reached reports whether an apply has come to the moment, or has passed it.
func (s stroke) reached(op maint.Op, parts []maint.Op) bool {
	i := slices.IndexFunc(op.Steps, func(st maint.Step) bool { return strings.HasSuffix(st.Name, "-"+string(s.step)) })
	if i < 0 || s.undoing() && op.Steps[i].Status != "undoing" && op.Steps[i].Status != "undone" {
		return op.State == maint.OpEnded
	}
	st := op.Steps[i]
	if over := st.Status == "undone" || st.Status == "done" && !s.undoing(); over || strings.HasSuffix(s.when, "before") {
		return true
	} else if strings.HasSuffix(s.when, "after") {
		return false
	}
	if strings.Contains(string(st.Data), `"begun"`) && !s.undoing() { // a command
		return true
	}
	return slices.ContainsFunc(parts, func(part maint.Op) bool {
		undoes := strings.Contains(string(part.ID), "-undo")
		return undoes == s.undoing() && part.State != maint.OpEnded && slices.Contains([]string{"hold", "swap", "perform", "return"}, part.Step)
	})
}

// Whose vCPUs stand still in the middle of it.
func (s stroke) stands() bool {
	return strings.HasSuffix(s.when, "during") && (s.step == maint.PlanHold || s.step == maint.PlanReplace)
}

// mayhem is hosts on which belayd is killed in applies.
type mayhem struct {
	*measure.Flock
	t    *testing.T
	ears map[string]*ear
}

// TestApplyKilled has belayd killed in the middle of each of the updates that show the
// ladder: by commands under running guests (A), with guests held (B1), with a new QEMU under
// each (B2), and with a host that leaves service, the owner of one guest being asked first (D,
// C). It ends well or is taken back, all guests are whole, each runs once, and the record is
// true. The long form has every step of each.
func TestApplyKilled(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Minute)
	defer cancel()
	m := &mayhem{newFlock(t, 2, 2, func(s *guest.Spec) { s.FileMemory = s.Name == "web-1" }), t, make(map[string]*ear)}
	for _, n := range m.Cluster.Nodes {
		m.ears[n.Name] = newEar(t, n)
		restartWith(ctx, t, n, eventsOn)
	}
	var view maint.PolicyView
	if err := m.At().BelayJSON(ctx, &view, "policy", "set", "web-2", "--ask", "D"); err != nil {
		t.Fatal(err)
	}
	strokes := []stroke{
		{updates.Component, false, maint.PlanPatch, "during"},
		{updates.Network, false, maint.PlanHold, "during"},
		{updates.QEMU, false, maint.PlanReplace, "during"},
		{updates.Retire, false, maint.PlanAnnounce, "after"},
		{updates.Network, true, maint.PlanHold, "undoing, during"},
		{updates.Retire, true, maint.PlanMove, "undoing, during"},
	}
	if long() {
		strokes = m.all(ctx)
	}
	for _, s := range strokes {
		begun := time.Now()
		m.killed(ctx, s)
		t.Logf("%s: %s", s, time.Since(begun).Round(100*time.Millisecond))
	}
}

// all are the moments of all steps that the updates come to.
func (m *mayhem) all(ctx context.Context) (all []stroke) {
	m.t.Helper()
	for _, name := range updates.All() {
		var kinds []maint.PlanStepKind
		for _, step := range m.plan(ctx, stroke{update: name}).Steps {
			if !slices.Contains(kinds, step.Kind) {
				kinds = append(kinds, step.Kind)
			}
		}
		for _, kind := range kinds {
			for _, when := range []string{"before", "during", "after"} {
				all = append(all, stroke{name, false, kind, when})
				if undone := slices.Contains([]maint.PlanStepKind{maint.PlanPrepare, maint.PlanHold, maint.PlanCordon, maint.PlanMove}, kind); undone {
					all = append(all, stroke{name, true, kind, "undoing, " + when})
				}
			}
		}
	}
	return all
}

// manifest is the update's, in a file.
func (m *mayhem) manifest(s stroke) string {
	m.t.Helper()
	path, err := updates.Write(m.t.TempDir(), s.update)
	if err != nil {
		m.t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		m.t.Fatal(err)
	}
	if s.update == updates.QEMU { // it is installed, and taken off again
		text = []byte(strings.Replace(string(text), "rungs = [\"B2\"]\n",
			"rungs = [\"B2\"]\nprepare = { command = [\"/usr/bin/touch\", \"/run/rebuilt\"] }\nundo = { command = [\"/usr/bin/rm\", \"-f\", \"/run/rebuilt\"] }\n", 1))
	}
	if s.bad {
		text = append(text, "\n[[checks]]\nname = \"bad\"\nwhen = [\"after\"]\ncommand = [\"/usr/bin/false\"]\nfailures = 1\n"...)
	}
	if err := os.WriteFile(path, text, 0o600); err != nil {
		m.t.Fatal(err)
	}
	return path
}

func (m *mayhem) plan(ctx context.Context, s stroke) (p maint.Plan) {
	m.t.Helper()
	if err := m.At().BelayJSON(ctx, &p, "plan", m.manifest(s)); err != nil {
		m.t.Fatalf("%s: %v", s, err)
	}
	return p
}

// killed applies an update, kills belayd at the moment, starts it again, and looks.
func (m *mayhem) killed(ctx context.Context, s stroke) {
	t, a := m.t, m.At()
	t.Helper()
	before := m.qemus(a)
	seen := m.witness(a)
	owners, approve := context.WithCancel(ctx)
	defer approve()
	if s.undoing() || s.step != maint.PlanAnnounce && s.step != maint.PlanCheck && s.step != maint.PlanPrepare {
		m.approve(owners)
	}
	m.ears[a.Name].listen(&bed{t: t})
	var op maint.Op
	if err := a.BelayJSON(ctx, &op, "apply", m.manifest(s), "--detach"); err != nil {
		t.Fatalf("%s: %v", s, err)
	}
	watch, reached := context.WithTimeout(ctx, 2*time.Minute)
	_, _ = a.Client().Watch(watch, op.ID, func(now maint.Op) {
		if s.reached(now, m.parts(watch, a, op.ID)) {
			reached()
		}
	})
	reached()
	if s.stands() {
		still, cancel := context.WithTimeout(ctx, 20*time.Second)
		m.ears[a.Name].heard(still, "suspended")
		cancel()
	}
	if err := a.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := a.Start(ctx); err != nil {
		t.Fatal(err)
	}
	m.approve(owners)
	op = ended(t, ctx, a, op.ID)
	for _, wrong := range m.wrong(ctx, s, a, op, before, seen()) {
		t.Errorf("%s: apply %s ended %q %v: %s", s, op.ID, op.Outcome, op.Problems, wrong)
	}
	for _, n := range m.Cluster.Nodes {
		if r, err := n.Belay(ctx, "uncordon"); err != nil || r.Code != 0 && r.Code != 70 {
			t.Errorf("%v: %s", err, r.Stderr)
		}
	}
	if out, err := a.Command(ctx, "/bin/sh", "-c", "ip link set uplink txqueuelen 1000; rm -f /run/rebuilt").CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// wrong is what is not as it must be after an apply.
func (m *mayhem) wrong(ctx context.Context, s stroke, a *cluster.Node, op maint.Op, before map[string]string, still map[string]time.Duration) (all []string) {
	say := func(format string, args ...any) { all = append(all, fmt.Sprintf(format, args...)) }
	done := op.Outcome == maint.OutcomeDone
	// A belayd that dies while guests stand still has that taken back.
	if undone := op.Outcome == maint.OutcomeFailed && (s.bad || s.step == maint.PlanHold || s.step == maint.PlanReplace); s.bad && done || !done && !undone {
		say("it should have ended otherwise")
	}
	if op.Resumed > 1 {
		say("it was resumed %d times", op.Resumed)
	}
	if done && s.update == updates.Retire {
		m.Sent(m.Other())
	}
	if err := m.Prove(ctx, nil); err != nil {
		say("%v", err)
	}
	effects := map[string]string{updates.Network: "ip -o link show uplink | grep -q 'qlen 2000'", updates.QEMU: "test -e /run/rebuilt"}
	if has := effects[s.update]; has != "" {
		if is := a.Command(ctx, "/bin/sh", "-c", has).Run() == nil; is != done {
			say("the host is changed: %t", is)
		}
	}
	status, err := a.Client().Status(ctx)
	if err != nil {
		say("%v", err)
	}
	if cordoned := done && s.update == updates.Retire; (status.Cordon != nil) != cordoned {
		say("its cordon: %+v", status.Cordon)
	}
	for _, c := range status.Conditions {
		if c.Code != maint.CodeCordoned {
			say("its condition: %+v", c)
		}
	}
	for _, part := range m.parts(ctx, a, op.ID) {
		if part.State != maint.OpEnded || part.Outcome == maint.OutcomeStuck {
			say("%s is %s %s: %v", part.ID, part.State, part.Outcome, part.Problems)
		}
		if now := m.qemus(a); part.Kind == maint.OpReplace && part.Outcome == maint.OutcomeDone && now[part.Guest] == before[part.Guest] {
			say("%s is in its old QEMU", part.Guest)
		}
	}
	if left, _ := filepath.Glob(a.Path("/run/belay/steps/*")); len(left) > 0 {
		say("of its commands is left %v", left)
	}
	awaitOver(m.t, ctx, a)
	return append(all, m.untold(ctx, a, op, still)...)
}

// untold are guests that stood still for longer than the record tells.
func (m *mayhem) untold(ctx context.Context, a *cluster.Node, op maint.Op, still map[string]time.Duration) (all []string) {
	r, err := a.Client().Report(ctx, op.ID)
	if err != nil {
		return []string{err.Error()}
	}
	told, unmeasured := make(map[string]time.Duration), make(map[string]bool)
	for _, g := range r.Guests {
		switch {
		case g.Felt == nil:
			unmeasured[g.UUID] = unmeasured[g.UUID] || strings.HasPrefix(g.Fate, "held")
		case g.Felt.Times > 0 && g.Felt.Longest == 0:
			unmeasured[g.UUID] = true
		default:
			told[g.UUID] = max(told[g.UUID], g.Felt.Longest)
		}
	}
	for uuid, d := range still {
		if told[uuid] < d-time.Second && !unmeasured[uuid] {
			all = append(all, fmt.Sprintf("guest %s stood still for %s, and the record tells %s", uuid, d, told[uuid]))
		}
	}
	return all
}

// qemus are the processes of a host's guests.
func (m *mayhem) qemus(n *cluster.Node) map[string]string {
	all := make(map[string]string)
	for _, g := range m.Guests {
		all[g.Spec.Name], _ = readHostFile(n.Host, "/run/libvirt/qemu/"+g.Spec.Name+".pid") // none: it is elsewhere
	}
	return all
}

// parts are the operations that an apply has had.
func (m *mayhem) parts(ctx context.Context, n *cluster.Node, apply maint.OpID) []maint.Op {
	ops, err := n.Client().Ops(ctx)
	if err != nil && ctx.Err() == nil {
		m.t.Error(err)
	}
	return slices.DeleteFunc(ops, func(op maint.Op) bool { return op.Part != apply })
}

// approve has the guests' owners approve of all that they are told, wherever they are, through
// restarts of belayd.
func (m *mayhem) approve(ctx context.Context) {
	for _, n := range m.Cluster.Nodes {
		go func() {
			for ctx.Err() == nil {
				_ = n.Client().WatchEvents(ctx, false, func(all []maint.ScheduledEvent) error {
					for _, e := range all {
						if e.State == maint.EventScheduled && e.Approval == nil {
							_, _ = n.Client().ApproveEvent(ctx, e.ID, "") // or it is over by now
						}
					}
					return nil
				})
				select {
				case <-time.After(50 * time.Millisecond):
				case <-ctx.Done():
				}
			}
		}()
	}
}

// awaitOver waits until no event is open: they end after what they were about.
func awaitOver(t *testing.T, ctx context.Context, n *cluster.Node) {
	t.Helper()
	ctx, over := context.WithTimeout(ctx, time.Minute)
	defer over()
	var left []maint.ScheduledEvent
	_ = n.Client().WatchEvents(ctx, false, func(all []maint.ScheduledEvent) error {
		if left = all; len(all) == 0 {
			over()
		}
		return nil
	})
	if len(left) > 0 {
		t.Errorf("events are open: %+v", left)
	}
}

// witness hears from libvirt how long each guest of a host stands still at most, until it is
// asked. One that leaves the host is not heard of any more.
func (m *mayhem) witness(n *cluster.Node) func() map[string]time.Duration {
	events, cancel := m.ears[n.Name].hv.Subscribe()
	var mu sync.Mutex
	longest, since := make(map[string]time.Duration), make(map[string]time.Time)
	go func() {
		for e := range events {
			mu.Lock()
			switch from, stands := since[e.UUID]; {
			case e.Change == "suspended" && !stands:
				since[e.UUID] = e.Time
			case e.Change == "resumed" && stands:
				longest[e.UUID] = max(longest[e.UUID], e.Time.Sub(from))
				delete(since, e.UUID)
			case e.Change == "stopped" && e.Detail == "migrated":
				delete(since, e.UUID)
			}
			mu.Unlock()
		}
	}()
	return func() map[string]time.Duration {
		cancel()
		mu.Lock()
		defer mu.Unlock()
		return longest
	}
}
