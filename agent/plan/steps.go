package plan

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"belay/agent/maint"
)

// steps writes a plan's steps, in the order in which they are done: nothing is told before
// what can be found out beforehand is, and nobody moves before those who are told are.
func (t *timetable) steps(p maint.Plan) []maint.PlanStep {
	w := writer{t: t, checks: p.Update.Checks}
	w.add(maint.PlanStep{Kind: maint.PlanCheck, Text: "see that the host and its guests are fit" + w.asking(maint.CheckBefore)})
	for _, c := range p.Update.Changes {
		w.prepare(c)
	}
	var told []string
	for _, g := range p.Guests {
		if !g.Told.IsZero() {
			told = append(told, g.UUID)
		}
	}
	if len(told) > 0 {
		w.add(maint.PlanStep{Kind: maint.PlanAnnounce, Guests: told, Text: "tell " + count(told, "guest"), Undo: "the events are called off"})
	}
	// What nobody feels, and nothing else comes before, need not wait.
	first := 0
	for ; first < len(t.ways) && t.ways[first].rung == maint.RungA; first++ {
		w.change(first)
	}
	leaving := t.leaving()
	empty := slices.ContainsFunc(t.ways, func(w way) bool { return w.rung == maint.RungD })
	if len(leaving) > 0 || empty {
		w.add(maint.PlanStep{Kind: maint.PlanCordon, Text: "have the host take no guests in", Undo: "it takes them in again"})
	}
	for _, c := range leaving {
		w.add(maint.PlanStep{Kind: maint.PlanMove, Guests: []string{c.g.UUID}, To: c.peer, At: w.after(t.begin[c.g.UUID]),
			Text: "move " + c.g.Guest + " to " + c.peer, Undo: "it is brought back"})
	}
	for i := range t.ways[first:] {
		w.change(first + i)
	}
	w.add(maint.PlanStep{Kind: maint.PlanVerify, Text: "see that every guest runs and does its work" + w.asking(maint.CheckAfter)})
	w.home(p, leaving, empty)
	return w.steps
}

type writer struct {
	t      *timetable
	checks []maint.UpdateCheck
	steps  []maint.PlanStep
	// kexec and replaced are that these steps have been written: they are for all changes
	// that are done so.
	kexec, replaced bool
}

func (w *writer) add(s maint.PlanStep) {
	s.N = len(w.steps) + 1
	w.steps = append(w.steps, s)
}

// after is a moment to wait for, none for now.
func (w *writer) after(at time.Time) time.Time {
	if at.After(w.t.now) {
		return at
	}
	return time.Time{}
}

// asking names the checks that are asked then.
func (w *writer) asking(when maint.CheckWhen) string {
	var names []string
	for _, c := range w.checks {
		if c.At(when) {
			names = append(names, c.Name)
		}
	}
	if len(names) == 0 {
		return ""
	}
	return "; ask " + strings.Join(names, ", ")
}

func (w *writer) prepare(c maint.Change) {
	s := maint.PlanStep{Kind: maint.PlanPrepare, Changes: []string{c.Name}}
	var does []string
	if n := len(c.Artifacts); n > 0 {
		does = append(does, fmt.Sprintf("see that %d files are the right ones", n))
	}
	if c.Prepare != nil {
		does = append(does, StepName(c.Prepare.HostStep))
		s.Expected, s.Undo = c.Prepare.Expected, undoOf(c)
	}
	if len(does) > 0 {
		s.Text = "prepare " + c.Name + ": " + strings.Join(does, ", ")
		w.add(s)
	}
}

func undoOf(c maint.Change) string {
	if c.Undo == nil {
		return ""
	}
	return StepName(c.Undo.HostStep)
}

// change writes what is done for a change.
func (w *writer) change(i int) {
	way, at := w.t.ways[i], w.after(w.t.at[i])
	c := way.change
	if name := w.asking(maint.CheckBetween); name != "" && i > 0 {
		w.add(maint.PlanStep{Kind: maint.PlanVerify, Text: "between changes" + name})
	}
	stay := w.t.feeling(way)
	slices.SortStableFunc(stay, func(a, b *candidate) int { return w.t.begin[a.g.UUID].Compare(w.t.begin[b.g.UUID]) })
	var uuids, names []string
	for _, s := range stay {
		uuids, names = append(uuids, s.g.UUID), append(names, s.g.Guest)
	}
	s := maint.PlanStep{Changes: []string{c.Name}, At: at, Expected: c.Standstill(), Undo: undoOf(c)}
	switch {
	case way.rung == maint.RungA && c.Apply == nil && (c.Kind == maint.ChangePackages || c.Kind == maint.ChangeService):
		return // it was prepared, and that is all
	case way.rung == maint.RungA:
		s.Kind, s.Text = maint.PlanPatch, c.Name+": "+doing(c)
		if c.File != "" {
			s.Undo = "it is taken back"
		}
	case way.rung == maint.RungB2:
		if w.replaced {
			return
		}
		w.replaced = true
		s.Changes = w.of(maint.RungB2, func(maint.Change) bool { return true })
		for n, g := range stay {
			w.add(maint.PlanStep{Kind: maint.PlanReplace, Changes: s.Changes, Guests: uuids[n : n+1], At: w.after(w.t.begin[g.g.UUID]),
				Text: fmt.Sprintf("%s: a new QEMU under %s", strings.Join(s.Changes, ", "), g.g.Guest) + method(g.stay.method)})
		}
		return
	case way.rung == maint.RungB1 && len(stay) > 0:
		s.Kind, s.Guests = maint.PlanHold, uuids
		s.Text = fmt.Sprintf("%s: hold %s, and %s", c.Name, count(names, "guest"), doing(c))
	case way.rung == maint.RungB3:
		if w.kexec {
			return
		}
		w.kexec = true
		s.Changes = w.of(maint.RungB3, func(maint.Change) bool { return true })
		s.Expected, s.Undo = 0, ""
		if len(stay) == 0 {
			s.Kind, s.Text = maint.PlanReboot, fmt.Sprintf("boot the host, for %s", strings.Join(s.Changes, ", "))
			break
		}
		s.Kind, s.Guests, s.Undo = maint.PlanKexec, uuids, "the old kernel, with the guests under it"
		s.Text = fmt.Sprintf("start another kernel under %s, for %s", count(names, "guest"), strings.Join(s.Changes, ", "))
	case way.rung == "":
		return
	default: // nobody is there who could feel it
		s.Kind, s.Text = maint.PlanService, c.Name+": "+doing(c)
		if c.Kind == maint.ChangeLeave {
			s.Text = c.Name + ": the host is without guests, and out of service"
		}
		if c.Apply != nil || c.Kind == maint.ChangeLeave || c.Kind == maint.ChangeService {
			w.add(s)
		}
		boot := w.of(maint.RungD, boots)
		if len(boot) == 0 || boot[len(boot)-1] != c.Name {
			return
		}
		s = maint.PlanStep{Kind: maint.PlanReboot, Changes: boot, At: at, Text: "boot the host, for " + strings.Join(boot, ", ")}
	}
	w.add(s)
}

func boots(c maint.Change) bool { return c.Kind == maint.ChangeKernel || c.Reboot }

// of names the changes that are done by a rung.
func (w *writer) of(r maint.Rung, so func(maint.Change) bool) (names []string) {
	for _, way := range w.t.ways {
		if way.rung == r && so(way.change) {
			names = append(names, way.change.Name)
		}
	}
	return names
}

// home brings back those that have moved away, if they are to be.
func (w *writer) home(p maint.Plan, leaving []*candidate, empty bool) {
	leaves := slices.ContainsFunc(p.Update.Changes, func(c maint.Change) bool { return c.Kind == maint.ChangeLeave })
	if leaves || len(leaving) == 0 && !empty {
		return
	}
	w.add(maint.PlanStep{Kind: maint.PlanUncordon, Text: "have the host take guests in again"})
	if p.Options.Return && len(leaving) > 0 {
		s := maint.PlanStep{Kind: maint.PlanReturn}
		for _, c := range leaving {
			s.Guests = append(s.Guests, c.g.UUID)
		}
		s.Text = "bring " + count(s.Guests, "guest") + " back"
		w.add(s)
	}
}

// doing is what is done for a change in a few words.
func doing(c maint.Change) string {
	switch {
	case c.Kind == maint.ChangeLivepatch:
		return "load " + c.File
	case c.Kind == maint.ChangeQEMU:
		return "patch guests' QEMUs by " + c.File
	case c.Kind == maint.ChangeMicrocode && c.Apply == nil:
		return "load CPU microcode"
	case c.Apply != nil:
		return StepName(c.Apply.HostStep)
	}
	return "nothing is to be done"
}

func method(m maint.VMMMethod) string {
	if m == "" {
		return ""
	}
	return ", " + string(m)
}

func count(of []string, what string) string {
	if len(of) == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", len(of), what)
}
