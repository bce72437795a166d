package vmtests

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/vmtests/cluster"
	"belay/vmtests/guest"
	"belay/vmtests/lab"
	"belay/vmtests/probe"
)

// matrix is a bed in which migrations are disturbed, over and over.
type matrix struct {
	*bed
	from, to *cluster.Node // of the migration that is disturbed
	link     *lab.Link     // of host-b
	ears     map[string]*ear

	op           maint.Op
	at           moment
	broken       func(*matrix) // what mends the fault that has struck
	abortRefused bool
	taken        []net.Listener
}

func (m *matrix) here() *ear  { return m.ears[m.from.Name] }
func (m *matrix) there() *ear { return m.ears[m.to.Name] }

// Words for a cell's outcomes.
const (
	stays   = "failed"
	moves   = "done"
	aborted = "aborted"
	either  = "done failed blocked"
)

// cell is one fault at one moment, and the outcomes that it may have. What else must be
// is the same for all: see holds.
type cell struct {
	fault string
	at    moment
	want  string
	short bool // of the short form
}

func cells() []cell {
	const in, out = true, false
	return []cell{
		{"source belayd", checking, moves, out},
		{"source belayd", before, moves, out},
		{"source belayd", copying, moves, out},
		{"source belayd", switching, moves, in},
		{"source belayd", finishing, moves, out},
		{"source belayd", confirming, moves, out},
		{"source belayd", verifying, moves, out},
		{"source belayd, away", copying, moves, in},
		{"both belayds", copying, moves, out},

		{"destination belayd", checking, either, out},
		{"destination belayd", before, either, out},
		{"destination belayd", copying, moves, out},
		{"destination belayd", switching, moves, out},
		{"destination belayd", finishing, moves, out},
		{"destination belayd", confirming, moves, out},
		{"destination belayd", verifying, moves, in},

		{"source libvirtd", checking, either, out},
		{"source libvirtd", before, either, out},
		{"source libvirtd", copying, stays, in},
		{"source libvirtd", switching, stays, out},
		{"source libvirtd", finishing, "partly done", out},
		{"source libvirtd", confirming, moves, in},
		{"source libvirtd", verifying, moves, out},

		{"destination libvirtd", checking, either, out},
		{"destination libvirtd", before, either, out},
		{"destination libvirtd", copying, stays, in},
		{"destination libvirtd", switching, stays, out},
		{"destination libvirtd", finishing, "partly done", in},
		{"destination libvirtd", confirming, moves, out},
		{"destination libvirtd", verifying, moves, out},

		{"destination QEMU", copying, stays, out},
		{"destination QEMU", switching, stays, in},

		{"the moved guest", finishing, "failed stuck done", out},
		{"the moved guest", confirming, moves, out},
		{"the moved guest", verifying, moves, out},

		{"LAN cut", checking, either, out},
		{"LAN cut", before, stays, out},
		{"LAN cut", copying, stays, out},
		{"LAN cut", switching, "failed done partly", out},
		{"LAN cut", finishing, "partly done", out},
		{"LAN cut", confirming, moves, out},
		{"LAN cut", verifying, moves, out},
		{"LAN silent", copying, stays, in},
		{"LAN silent", switching, "failed done partly", out},
		{"LAN silent", finishing, "partly done", out},
		{"10 % loss", asked, moves, out},
		{"10 % loss", copying, moves, out},
		{"10 % loss", switching, moves, out},
		{"200 ms delay", asked, moves, out},
		{"200 ms delay", copying, moves, out},
		{"200 ms delay", switching, moves, out},

		{"state_dir full", asked, stays, out},
		{"state_dir full", copying, "partly", out},
		{"libvirt folder full", asked, stays, out},
		{"definitions full", copying, stays, out},
		{"ports taken", asked, "blocked", in},
		{"ports taken", copying, moves, out},

		{"certificate expired", asked, "blocked", in},
		{"certificate expired", copying, moves, out},
		{"certificate of another", asked, "blocked", out},

		{"abort", checking, aborted, out},
		{"abort", before, aborted, out},
		{"abort", copying, aborted, in},
		{"abort", switching, "aborted done", out},
		{"abort", finishing, moves, out},
		{"abort", confirming, moves, out},
		{"abort", verifying, moves, out},
	}
}

// TestFaultMatrix breaks each thing at each moment of a migration (BELAY_LONG; else some of
// them), and then at random ($BELAY_ROUNDS of them, from $BELAY_SEED, which is printed). The
// guest always runs once, whole and never rebooted, where the operation's record says that
// it runs, kept as it was before; and the next migration works.
//
// The cells are tests of their own: -run 'TestFaultMatrix/cells/LAN_cut'.
func TestFaultMatrix(t *testing.T) {
	t.Parallel()
	m := newMatrix(t)
	var table []string
	t.Cleanup(func() { t.Logf("%d disturbed migrations:\n%s", len(table), strings.Join(table, "\n")) })
	all := map[string]fault{}
	for _, f := range faults() {
		all[f.name] = f
	}
	t.Run("cells", func(t *testing.T) {
		for _, c := range cells() {
			if !c.short && !long() {
				continue
			}
			t.Run(c.fault+"/"+string(c.at), func(t *testing.T) {
				line := m.round(t, all[c.fault], c.at, 0, c.want)
				table = append(table, line)
			})
		}
		t.Run("next", m.next)
	})
	rounds, seed := 0, rand.Uint64()
	if long() {
		rounds = 200
	}
	rounds = int(number(t, "BELAY_ROUNDS", uint64(rounds)))
	seed = number(t, "BELAY_SEED", seed)
	if rounds == 0 {
		return
	}
	t.Run("random", func(t *testing.T) {
		t.Logf("BELAY_SEED=%d BELAY_ROUNDS=%d", seed, rounds)
		moments := []moment{asked, checking, before, copying, switching, finishing, confirming, verifying}
		for i := range rounds {
			// Of its own seed, so that one round does not depend on the others.
			r := rand.New(rand.NewPCG(seed, uint64(i)))
			f := faults()[r.IntN(len(faults()))]
			at := moments[max(r.IntN(len(moments)), slices.Index(moments, f.from))]
			if f.to != "" && slices.Index(moments, at) > slices.Index(moments, f.to) {
				at = f.to
			}
			after := time.Duration(r.Int64N(int64(150*time.Millisecond))) * time.Duration(r.IntN(2))
			t.Run(fmt.Sprintf("%d", i), func(t *testing.T) {
				line := m.round(t, f, at, after, "")
				t.Log(line)
				table = append(table, line)
			})
		}
		t.Run("next", m.next)
	})
}

// number reads a number from the environment.
func number(t *testing.T, name string, otherwise uint64) uint64 {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

func newMatrix(t *testing.T) *matrix {
	b := newBed(t, lab.Config{}, func(b *bed, s *guest.Spec) {
		disk, err := b.Lab.AddDisk(b.ctx(time.Minute), "web-1.raw", 16<<20)
		if err != nil {
			t.Fatal(err)
		}
		s.Disk = disk
	})
	m := &matrix{bed: b, ears: map[string]*ear{}}
	for _, n := range b.Nodes {
		m.ears[n.Name] = newEar(t, n)
		m.smallState(n)
	}
	var err error
	if m.link, err = b.b.Emulate(b.ctx(time.Minute)); err != nil {
		t.Fatal(err)
	}
	m.onDisk(b.a, (*guest.Control).DiskWrite)
	m.from, m.to = b.a, b.b
	return m
}

func (m *matrix) onDisk(n *cluster.Node, do func(*guest.Control, context.Context, probe.DiskSettings) (probe.DiskReport, error)) {
	m.t.Helper()
	ctx := m.ctx(time.Minute)
	c, err := m.guest.Dial(ctx, n)
	m.must(err)
	defer c.Close()
	pattern := probe.DiskSettings{Seed: 7, SizeMiB: 4}
	if r, err := do(c, ctx, pattern); err != nil || r.BadBlocks != 0 {
		m.t.Fatalf("the guest's disk: %+v, %v", r, err)
	}
}

// round disturbs one migration, and checks what must be after it.
func (m *matrix) round(t *testing.T, f fault, at moment, after time.Duration, want string) (line string) {
	parent := m.t
	m.t, m.op, m.at, m.abortRefused = t, maint.Op{}, at, false
	defer func() {
		if t.Failed() {
			line += "   FAILED"
			m.afresh(parent)
		}
		m.t = parent
	}()
	defer func() {
		if t.Failed() {
			m.mend()
		}
	}()
	strike := func() {
		m.broken = f.mend
		f.strike(m)
	}
	line = fmt.Sprintf("%-22s %-8s", f.name, at)
	begun := time.Now()
	m.awaitPeers()
	if at == asked {
		strike()
		m.at = never
	}
	m.op = m.reach(m.at)
	time.Sleep(after) // a moment of its own, at random
	if at != asked {
		strike()
	}
	if !f.lasts {
		m.mend()
	}
	if at == copying && f.spares {
		m.hurry(never)
	}
	op := m.mendAndEnd(f)
	m.unhurry()
	line += fmt.Sprintf(" %-8s", op.Outcome)
	if want != "" && !slices.Contains(strings.Fields(want), string(op.Outcome)) {
		t.Errorf("outcome %q, want %q: %v", op.Outcome, want, op.Problems)
	}
	if took := time.Since(begun); took > 15*time.Second {
		for _, s := range op.Steps {
			t.Logf("%s %s: %v %v", op.ID, s.Name, s.Ended.Sub(s.Started).Round(time.Millisecond), s.Notes)
		}
	}
	if f.kills {
		line += m.ended(op)
		m.afresh(parent)
		return line
	}
	place := m.holds(op)
	line += fmt.Sprintf(" %-7s %5.1f s  resumed %d", place.Name, time.Since(begun).Seconds(), op.Resumed)
	if len(op.Problems) > 0 {
		line += "  " + op.Problems[0].Reason
	}
	// The next migration works. After one that has moved, and in the short form, that is the
	// next round's, or what comes after the last.
	m.from, m.to = place, m.other(place)
	if op.Outcome != maint.OutcomeDone && long() {
		m.next(t)
	}
	return line
}

// next has the guest migrate undisturbed.
func (m *matrix) next(t *testing.T) {
	parent := m.t
	m.t = t
	defer func() { m.t = parent }()
	if op := m.end(m.from, m.reach(never).ID); op.Outcome != maint.OutcomeDone {
		t.Fatalf("the next migration: %q, %v", op.Outcome, op.Problems)
	}
	m.isWhole(m.to)
	m.from, m.to = m.to, m.from
}

func (m *matrix) other(n *cluster.Node) *cluster.Node {
	if n == m.a {
		return m.b
	}
	return m.a
}

// mendAndEnd waits for the operation's end. What lasts is mended then, or when the source's
// libvirt has given the copy up and is to be asked where the guest is.
func (m *matrix) mendAndEnd(f fault) maint.Op {
	m.t.Helper()
	if m.broken == nil {
		return m.end(m.from, m.op.ID)
	}
	ended := make(chan maint.Op, 1)
	ctx := m.ctx(6 * time.Minute)
	go func() {
		op, err := m.from.Client().Watch(ctx, m.op.ID, func(maint.Op) {})
		if err == nil {
			ended <- op
		}
	}()
	given := make(chan struct{})
	cut := strings.HasPrefix(f.name, "LAN") && m.at != before || strings.HasPrefix(f.name, "certificate")
	if cut && m.at != never && m.at != checking {
		go func() {
			defer close(given)
			m.givenUp(ctx)
		}()
	}
	select {
	case op := <-ended:
		m.mend()
		return op
	case <-given:
	case <-ctx.Done():
		m.t.Fatal("the operation does not end")
	}
	m.mend()
	return m.end(m.from, m.op.ID)
}

// mend ends the fault that has struck, if it has not ended.
func (m *matrix) mend() {
	if mend := m.broken; mend != nil {
		m.broken = nil
		mend(m)
	}
}

// givenUp waits until the source's libvirt has no migration of the guest any more, or does
// not answer for it: a QEMU that was cut off in its switch-over hears nobody, until TCP gives
// up or the network is back.
func (m *matrix) givenUp(ctx context.Context) {
	for ctx.Err() == nil {
		ask, cancel := context.WithTimeout(ctx, 40*time.Second)
		out, err := m.from.Virsh(ask, "domjobinfo", "web-1")
		cancel()
		if err != nil || strings.Contains(out, "None") {
			return
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// awaitPeers waits until both belayds answer each other again.
func (m *matrix) awaitPeers() {
	m.t.Helper()
	for _, n := range m.Nodes {
		m.eventually("the peer of "+n.Name, func() error {
			checks, err := n.Client().Doctor(m.ctx(30 * time.Second))
			if err != nil {
				return err
			}
			for _, c := range checks {
				if c.Result == maint.CheckFail {
					return fmt.Errorf("%s: %s", c.Name, c.Text)
				}
			}
			return nil
		})
	}
}

// afresh begins with a new guest, after a round that has failed: the others can still tell
// something.
func (m *matrix) afresh(parent *testing.T) {
	m.t = parent
	ctx := m.ctx(2 * time.Minute)
	for _, n := range m.Nodes {
		_, _ = n.Virsh(ctx, "destroy", "web-1")
		_, _ = n.Virsh(ctx, "undefine", "web-1")
		if s, err := n.Client().Status(ctx); err == nil {
			for _, op := range s.Operations {
				_, _ = n.Client().Abort(ctx, op.ID)
				_ = m.end(n, op.ID)
			}
		}
	}
	m.link.Perfect()
	m.freePorts()
	if err := errors.Join(m.from.Netem(ctx), m.to.Netem(ctx), m.b.SetLink(ctx, true)); err != nil {
		parent.Error(err)
	}
	m.from, m.to = m.a, m.b
	for _, n := range m.Nodes { // that of an operation that is stuck lapses
		for ctx := m.ctx(2 * time.Minute); ctx.Err() == nil; time.Sleep(time.Second) {
			if s, err := n.Client().Status(ctx); err == nil && len(s.Reservations) == 0 {
				break
			}
		}
	}
	m.start()
	m.onDisk(m.a, (*guest.Control).DiskWrite)
}
