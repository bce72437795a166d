package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"belay/agent/maint"
	"belay/migrate"
	"belay/notify/window"
	"belay/patch/live"
	"belay/patch/vmm"
)

// ladder is all that an update is planned from: what this host, its guests and the peers
// say of each rung that a change could take. Nothing is changed. An error says that libvirt
// could not be asked; what merely stands in the way is in it. only is a guest's key for which
// it is to be, "" for all: what is asked of a guest, and of peers about it, is asked of no other.
func (a *Agent) ladder(ctx context.Context, u maint.Update, o maint.PlanOptions, only string) (maint.Ladder, error) {
	host, err := a.hyp.Info(ctx)
	if err != nil {
		return maint.Ladder{}, err
	}
	guests, err := a.present(ctx)
	if err != nil {
		return maint.Ladder{}, err
	}
	l := maint.Ladder{Host: a.cfg.Host, HostUUID: host.UUID, Now: time.Now(), Tells: a.cfg.Events.Enabled, MaxHold: a.cfg.Hold.MaxPauseLimit.Duration, History: a.felt()}
	s := survey{a: a, update: u, deadline: u.Deadline(l.Now)}
	for _, g := range guests {
		_, there := a.findElsewhere(g)
		wanted := only == "" || keyOf(g) == only
		switch runs := g.State.Active() || there; {
		case runs && wanted:
			s.guests = append(s.guests, g)
			fallthrough
		case runs:
			s.running = append(s.running, g.Name)
		case wanted:
			l.Off = append(l.Off, g.Name)
		}
	}
	s.verdicts = make([][]maint.GuestVerdict, len(s.guests))
	if err := s.ask(ctx, o, &l); err != nil {
		return maint.Ladder{}, err
	}
	return l, nil
}

// survey asks for what a ladder has.
type survey struct {
	a        *Agent
	update   maint.Update
	deadline time.Time
	running  []string      // the names of all that run, or are between two QEMUs
	guests   []maint.Guest // those of them that are asked
	verdicts [][]maint.GuestVerdict
	kexec    []maint.Problem // what the host has against another kernel, and its guests
}

// takes reports whether any change could be delivered by a rung.
func (s *survey) takes(r maint.Rung) bool {
	return slices.ContainsFunc(s.update.Changes, func(c maint.Change) bool { return c.Delivers(r) })
}

func (s *survey) ask(ctx context.Context, o maint.PlanOptions, l *maint.Ladder) error {
	if err := s.askKexec(ctx); err != nil {
		return err
	}
	for _, c := range s.update.Changes {
		for _, r := range c.Rungs {
			l.Verdicts = append(l.Verdicts, maint.HostVerdict{Change: c.Name, Rung: r, Problems: s.hostProblems(ctx, c, r)})
		}
	}
	if err := s.askGuests(ctx); err != nil {
		return err
	}
	peers, err := s.askPeers(ctx, o, l)
	if err != nil {
		return err
	}
	for i, g := range s.guests {
		p, err := s.a.policyOf(g)
		of := maint.LadderGuest{Guest: g.Name, UUID: keyOf(g), Takes: migrate.Takes(g.MemoryBytes, peers.pages[g.UUID]), Policy: p,
			Verdicts: s.verdicts[i], Peers: peers.verdicts[keyOf(g)]}
		if err != nil { // it may say anything
			for n := range of.Verdicts {
				of.Verdicts[n].Problems = append(of.Verdicts[n].Problems, *maint.AsProblem(err, maint.CodePolicy, "guest "+g.Name))
			}
		}
		if w, err := window.Parse(p.Windows...); err == nil && len(p.Windows) > 0 {
			for _, slot := range w.Slots(l.Now, s.deadline.Add(policyAhead)) {
				of.Slots = append(of.Slots, maint.Slot{Start: slot.Start.UTC(), End: slot.End.UTC()})
			}
		}
		l.Guests = append(l.Guests, of)
	}
	return nil
}

// askKexec asks once what stands in the way of another kernel.
func (s *survey) askKexec(ctx context.Context) error {
	i := slices.IndexFunc(s.update.Changes, func(c maint.Change) bool { return c.Delivers(maint.RungB3) && c.Kernel != "" })
	switch {
	case i < 0:
		return nil
	case s.a.preserve.Kexec.Loader == nil:
		s.kexec = []maint.Problem{*maint.Problemf(maint.CodeKexec, "host "+s.a.cfg.Host, "see 'belay doctor' for rung B", "has nothing to start another kernel by")}
		return nil
	}
	c := s.update.Changes[i]
	v, err := s.a.kexecJob("", maint.KexecRequest{Kernel: c.Kernel, Initrd: c.Initrd, Append: c.Append, All: true}).Plan(ctx)
	if errors.Is(err, maint.ErrHypervisorDown) {
		return err
	}
	if _, missing := os.Stat(filepath.Join("/", s.a.preserve.Kexec.Tree.Root, c.Kernel)); c.Prepare != nil && errors.Is(missing, fs.ErrNotExist) {
		// Its preparation is to bring it; it is judged when it is there.
		v.Problems = slices.DeleteFunc(v.Problems, func(p maint.Problem) bool {
			return p.Code == maint.CodeImage && (p.Subject == "kernel "+c.Kernel || p.Subject == "initrd "+c.Initrd)
		})
	}
	if s.kexec = v.Problems; err != nil {
		s.kexec = []maint.Problem{*maint.AsProblem(err, maint.CodeKexec, "host "+s.a.cfg.Host)}
	}
	return nil
}

// ofGuest are those of some problems that are about a guest; "" is those about none of
// the guests here.
func (s *survey) ofGuest(name string, ps []maint.Problem) (some []maint.Problem) {
	for _, p := range ps {
		of := ""
		for _, running := range s.running {
			if p.Subject == "guest "+running {
				of = running
			}
		}
		if of == name {
			some = append(some, p)
		}
	}
	return some
}

// hostProblems is why this host cannot do a change by a rung.
func (s *survey) hostProblems(ctx context.Context, c maint.Change, r maint.Rung) []maint.Problem {
	ps := s.stepProblems(ctx, c)
	switch r {
	case maint.RungA:
		ps = append(ps, s.hotProblems(ctx, c)...)
	case maint.RungB1:
		if k := s.a.checkLeash(); k.Result == maint.CheckFail {
			ps = append(ps, *maint.Problemf(maint.CodeLeash, "leash", k.Remedy, "%s", k.Text))
		}
	case maint.RungB3:
		ps = append(ps, s.ofGuest("", s.kexec)...)
	}
	return ps
}

// hotProblems is why it cannot be done by rung A, its steps aside. That nobody feels a command
// is what the manifest says.
func (s *survey) hotProblems(ctx context.Context, c maint.Change) []maint.Problem {
	a := s.a
	switch c.Kind {
	case maint.ChangeLivepatch:
		f, err := a.InspectPatch(ctx, c.File)
		if err != nil {
			return []maint.Problem{*maint.AsProblem(err, maint.CodePatchFile, "livepatch "+c.File)}
		}
		return f.Problems
	case maint.ChangeMicrocode:
		if t := a.preserve.Live.Host.Tree; !t.LoadsMicrocode() {
			return []maint.Problem{*maint.Problemf(maint.CodeNeedsReboot, "CPU microcode", "put it into the initrd, and use rung B3 or D", "this kernel loads none late")}
		}
		return nil
	case maint.ChangeQEMU:
		j := a.qemuPatch(maint.PatchRequest{Action: maint.PatchQEMU, File: c.File, All: true})
		return slices.DeleteFunc(j.Judge(ctx), func(p maint.Problem) bool { return p.Code == maint.CodeNothing })
	case maint.ChangeService:
		return live.ComponentProblems(c.Apply.Unit, c.Apply.Job, a.cfg.Patch.Components)
	}
	return nil
}

// stepProblems is why a change's steps cannot be run here. What is prepared may bring along
// what the others need.
func (s *survey) stepProblems(ctx context.Context, c maint.Change) (ps []maint.Problem) {
	steps := []*maint.ChangeStep{c.Apply, c.Verify, c.Undo}
	if c.Prepare != nil {
		steps = []*maint.ChangeStep{c.Prepare}
	}
	for _, step := range steps {
		if step != nil {
			ps = append(ps, s.a.preserve.Steps.Check(ctx, step.HostStep)...)
		}
	}
	return ps
}

// askGuests asks for each guest's verdicts on the rungs of B, some guests side by side.
func (s *survey) askGuests(ctx context.Context) error {
	return sideBySide(surveys, s.guests, func(i int, g maint.Guest) (err error) {
		s.verdicts[i], err = s.guest(ctx, g)
		return err
	})
}

func (s *survey) guest(ctx context.Context, g maint.Guest) ([]maint.GuestVerdict, error) {
	busy := s.a.engaged(g)
	if g.Job != "" && len(busy) == 0 {
		busy = append(busy, *maint.Problemf(maint.CodeBusy, "guest "+g.Name, "wait for it to end", "has a job running: %s", g.Job))
	}
	stands := ""
	if !works(g) && len(busy) == 0 {
		stands = fmt.Sprintf("it is %s (%s), not by Belay, and is left so", g.State, g.Reason)
	}
	b1 := maint.GuestVerdict{Rung: maint.RungB1, Problems: busy, Untouched: stands}
	b2 := maint.GuestVerdict{Rung: maint.RungB2, Problems: busy}
	if len(busy) == 0 && s.takes(maint.RungB2) {
		var err error
		if b2, err = s.replaceable(ctx, g); err != nil {
			return nil, err
		}
	}
	b3 := maint.GuestVerdict{Rung: maint.RungB3, Problems: slices.Concat(busy, s.ofGuest(g.Name, s.kexec)), Untouched: stands}
	return []maint.GuestVerdict{b1, b2, b3, {Rung: maint.RungD}}, nil
}

// replaceable is the verdict on a new QEMU.
func (s *survey) replaceable(ctx context.Context, g maint.Guest) (maint.GuestVerdict, error) {
	v := maint.GuestVerdict{Rung: maint.RungB2}
	f, err := vmm.Survey(ctx, vmmHost{s.a.hyp}, s.a.preserve.Places, g.UUID)
	if err != nil {
		if errors.Is(err, maint.ErrHypervisorDown) {
			return v, err
		}
		v.Problems = []maint.Problem{*maint.AsProblem(err, maint.CodeQEMU, "guest "+g.Name)}
		return v, nil
	}
	wanted := ""
	for _, c := range s.update.Changes {
		if c.Kind == maint.ChangeQEMU && c.Delivers(maint.RungB2) {
			if wanted = c.Version; wanted != f.QEMU {
				break
			}
		}
	}
	if wanted != "" && wanted == f.QEMU {
		v.Untouched = "it runs in QEMU " + f.QEMU + " already"
		return v, nil
	}
	choices, err := s.a.choices(ctx, f)
	if err != nil {
		return v, err
	}
	best, err := vmm.Choose(g.Name, choices, "", 0)
	var refusal *maint.Refusal
	switch {
	case errors.As(err, &refusal):
		v.Problems = refusal.Problems
	case err != nil:
		return v, err
	default:
		v.Method, v.Pause = best.Method, best.Pause
	}
	return v, nil
}

// peersAsked is what peers say of the guests.
type peersAsked struct {
	verdicts map[string][]maint.PeerVerdict // by keyOf
	pages    map[string][]maint.PageNeed    // by UUID
}

// askPeers asks them as a drain does, if any change could be delivered by rung D.
func (s *survey) askPeers(ctx context.Context, o maint.PlanOptions, l *maint.Ladder) (p peersAsked, err error) {
	p = peersAsked{verdicts: make(map[string][]maint.PeerVerdict), pages: make(map[string][]maint.PageNeed)}
	if !s.takes(maint.RungD) {
		return p, nil
	}
	a := s.a
	names := a.peersFor(maint.DrainRequest{To: o.To})
	to := a.destinations(ctx, names)
	rooms, closed := a.rooms(ctx, to)
	for _, name := range names {
		l.Peers = append(l.Peers, maint.LadderPeer{Name: name, Room: rooms[name]})
	}
	var ask []maint.Guest
	for _, g := range s.guests {
		if e, there := a.findElsewhere(g); there {
			for _, name := range names {
				p.verdicts[keyOf(g)] = append(p.verdicts[keyOf(g)], maint.PeerVerdict{Peer: name, Problems: []maint.Problem{*e.problem()}})
			}
			continue
		}
		ask = append(ask, g)
	}
	all, err := a.verdicts(ctx, "cannot say where guests could be moved to", ask, to, a.cfg.Migration.CopyDisks)
	if err != nil {
		return p, err
	}
	for _, v := range all {
		p.verdicts[v.GuestUUID] = append(p.verdicts[v.GuestUUID], maint.PeerVerdict{Peer: v.Peer, Problems: append(v.Problems, closed[v.Peer]...)})
	}
	for _, g := range ask {
		if d, err := (source{a.hyp, a.local}).Describe(ctx, g.UUID); err == nil {
			p.pages[g.UUID] = d.Pages
		}
	}
	for _, key := range slices.Sorted(maps.Keys(p.verdicts)) {
		slices.SortFunc(p.verdicts[key], func(x, y maint.PeerVerdict) int { return strings.Compare(x.Peer, y.Peer) })
	}
	return p, nil
}
