package migrate

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"belay/agent/maint"
)

// Preflight asks both hosts whether the guest can move, and returns a
// *maint.Refusal with every reason why not.
func (m *Migration) Preflight(ctx context.Context, s Scratch) error {
	b, problems, err := m.survey(ctx)
	if err != nil {
		return m.notBegun(ctx, err)
	}
	if len(problems) > 0 {
		return m.refuse(problems)
	}
	return s.Save(b)
}

// Survey is Preflight that nothing comes after: it gives every reason for which
// the guest cannot move.
func (m *Migration) Survey(ctx context.Context) ([]maint.Problem, error) {
	_, problems, err := m.survey(ctx)
	return problems, err
}

func (m *Migration) survey(ctx context.Context) (b before, problems []maint.Problem, err error) {
	op := ctx
	ctx, cancel := context.WithTimeout(op, settleGrace) // no host may hold it for longer
	defer cancel()

	g, err := m.Source.Guest(ctx, m.UUID)
	if err != nil {
		return b, nil, fmt.Errorf("cannot look at guest %s: %w", m.Guest, err)
	}
	b, d, err := m.describe(ctx, g)
	if err != nil {
		return b, nil, err
	}
	problems = m.unfit(g)
	needs, unmark, apart, err := m.mark(ctx, d.Needs)
	defer unmark()
	var refusal error // libvirt's own, which needs a running guest
	var dry sync.WaitGroup
	if len(problems) == 0 {
		dry.Go(func() { // while the destination judges
			ctx, cancel := context.WithTimeout(op, askTimeout) // it may take all of the other
			defer cancel()
			refusal = m.Source.DryRun(ctx, m.UUID, m.params(g.Persistent))
		})
	}
	var there []maint.Problem
	if err == nil {
		there, err = m.ask(ctx, &b.Arrival, needs)
	}
	dry.Wait()
	if errors.Is(refusal, maint.ErrHypervisorDown) || refusal != nil && op.Err() != nil {
		return b, nil, refusal
	}
	problems = append(problems, m.rooted(d)...)
	problems = append(problems, m.plain()...)
	switch {
	case err != nil && op.Err() != nil: // we gave up, which is not the peer's fault
		return b, nil, fmt.Errorf("cannot ask %s for guest %s: %w", m.To, m.Guest, err)
	case err != nil:
		problems = append(problems, *maint.AsProblem(err, maint.CodePeerDown, "peer "+m.To))
	default:
		problems = append(problems, m.Source.CheckWay(ctx, m.From, m.To, m.Params)...)
	}
	problems = append(append(problems, apart...), there...)
	if refusal != nil && !told(problems, d, refusal) {
		problems = append(problems, *maint.Problemf(maint.CodeSourceRefuses, "guest "+m.Guest, "change what libvirt names; if that is storage, put its disks on storage that both hosts share, opened with cache=none", "libvirt refuses to migrate it: %v", refusal))
	}
	return b, problems, nil
}

// told reports whether libvirt refuses what has been said already, in other
// words: it names the first thing only that it finds.
func told(problems []maint.Problem, d Description, refusal error) bool {
	if !errors.Is(refusal, maint.ErrUnsafeStorage) {
		return len(d.Bound) > 0
	}
	return slices.ContainsFunc(problems, func(p maint.Problem) bool {
		return p.Code == maint.CodeDiskNotShared || p.Code == maint.CodeDiskMissing || p.Code == maint.CodeDiskCache
	})
}

// rooted is what of a guest's devices keeps it on its host, wherever it is to go.
func (m *Migration) rooted(d Description) (problems []maint.Problem) {
	for _, b := range d.Bound {
		problems = append(problems, *maint.Problemf(maint.CodeHostDevice, "guest "+m.Guest,
			"detach it ("+b.How+"), migrate, attach one of the destination's", "has %s, which belongs to %s", b.What, m.From))
	}
	for _, f := range d.Unsafe {
		if m.isCopied(f.Path) { // it is read as the guest sees it
			continue
		}
		problems = append(problems, *maint.Problemf(maint.CodeDiskCache, "guest "+m.Guest,
			"set cache='none' in its definition and restart it", "leaves out flushes to %s (%s, cache='unsafe'): what is in this host's memory would be missed at the destination", f.Path, f.For))
	}
	return problems
}

// mark marks what must be the same storage on both hosts, until unmark, and chooses what is
// to be copied, apart from what cannot be.
func (m *Migration) mark(ctx context.Context, needs maint.Needs) (marked maint.Needs, unmark func(), apart []maint.Problem, err error) {
	needs.Files, unmark = m.Source.Mark(ctx, needs.Files)
	needs.Files, apart, err = m.chooseCopies(ctx, needs.Files)
	return needs, unmark, apart, err
}

// ask has the destination judge the arrival. What is to be copied is written into a.
func (m *Migration) ask(ctx context.Context, a *maint.Arrival, needs maint.Needs) ([]maint.Problem, error) {
	a.Disks = m.copies
	question := *a
	if !needs.Empty() { // an older belayd knows of no needs
		question.Needs = &needs
	}
	return m.Destination.Check(ctx, question)
}

// reasonUser is why a guest is paused that somebody has paused, as with virsh suspend.
const reasonUser = "user"

// unfit is why a guest in this state is not to be moved.
func (m *Migration) unfit(g maint.Guest) (problems []maint.Problem) {
	add := func(code maint.Code, remedy, format string, args ...any) {
		problems = append(problems, *maint.Problemf(code, "guest "+m.Guest, remedy, format, args...))
	}
	switch {
	case !g.State.Active():
		add(maint.CodeGuestOff, "start it first, or move its definition with virsh", "is %s", g.State)
	case g.State == maint.GuestPaused && g.Reason == reasonUser: // it arrives paused
	case g.State == maint.GuestPaused:
		add(maint.CodeGuestPaused, "resume it first (virsh resume), if whoever paused it agrees",
			"is paused (%s), and Belay did not pause it", g.Reason)
	case g.State != maint.GuestRunning && g.State != maint.GuestBlocked:
		add(maint.CodeGuestState, "wait until it runs normally", "is %s (%s)", g.State, g.Reason)
	}
	if g.Job != "" {
		add(maint.CodeBusy, "wait for the job to end, or abort it (virsh domjobabort)", "has a %s job in progress", g.Job)
	}
	return problems
}

func (m *Migration) describe(ctx context.Context, g maint.Guest) (before, Description, error) {
	host, err := m.Source.Info(ctx)
	if err != nil {
		return before{}, Description{}, fmt.Errorf("cannot describe this host: %w", err)
	}
	d, err := m.Source.Describe(ctx, m.UUID)
	if err != nil {
		return before{}, Description{}, fmt.Errorf("cannot describe guest %s: %w", m.Guest, err)
	}
	return before{Persistent: g.Persistent, Autostart: g.Autostart, XML: d.Inactive, Arrival: maint.Arrival{
		Op: m.Op, Guest: g.Name, GuestUUID: g.UUID, MemoryBytes: g.MemoryBytes, VCPUs: g.VCPUs,
		Arch: host.Arch, DomainType: g.DomainType, MachineType: g.MachineType, HostUUID: host.UUID,
		CPUXML: d.CPUXML, Pages: d.Pages,
		Way: m.way()}}, d, nil
}

// way is how the guest's memory is to be sent, as far as this host knows.
func (m *Migration) way() *maint.Way {
	w := &maint.Way{URI: m.Params.MigrateURI, TLS: m.Params.TLS, TLSName: m.Params.TLSName}
	if w.TLS {
		w.CAs = m.Source.Trusts()
	}
	return w
}
