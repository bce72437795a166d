package vmtests

import (
	"context"
	"slices"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/hypervisor"
	"belay/migrate"
	"belay/vmtests/cluster"
)

// moment is a point of a migration at which something can break. Each is known by
// what libvirt or belayd tells when it is there, never by the time that has passed.
//
//	asked ─ checking ─ before ─ copying ─ switching ─ finishing ─ confirming ─ verifying
type moment string

const (
	asked      moment = "asked"   // before belayd is asked for anything
	checking   moment = "check"   // it is admitted; both hosts are being asked
	before     moment = "before"  // the step perform has begun; its copy has not
	copying    moment = "copy"    // memory is being sent, which would never end by itself
	switching  moment = "switch"  // the source's vCPUs are stopped: its event suspended
	finishing  moment = "finish"  // the destination's run, and the source does not know it yet: the event resumed
	confirming moment = "confirm" // the source's process has ended: its event stopped
	verifying  moment = "verify"  // the step verify has begun
	never      moment = ""        // of a migration that nothing disturbs
)

// late reports whether a moment is after the copy.
func late(at moment) bool {
	return slices.Contains([]moment{switching, finishing, confirming, verifying}, at)
}

// ear hears what libvirt tells of one host's guests.
type ear struct {
	hv     *hypervisor.Host
	events <-chan maint.Event
	stop   func()
}

func newEar(t *testing.T, n *cluster.Node) *ear {
	e := &ear{hv: hypervisor.New(hypervisor.Config{Socket: n.LibvirtSocket()})}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- e.hv.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if err := e.hv.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

// listen forgets what was heard, and returns once events flow.
func (e *ear) listen(b *bed) {
	b.t.Helper()
	if e.stop != nil {
		e.stop()
	}
	e.events, e.stop = e.hv.Subscribe()
	for ctx := b.ctx(30 * time.Second); ; {
		select {
		case ev := <-e.events:
			if ev.Kind == maint.EventResync {
				return
			}
		case <-ctx.Done():
			b.t.Fatal("no events from libvirt")
		}
	}
}

// heard waits until libvirt has told a change.
func (e *ear) heard(ctx context.Context, change string) bool {
	for {
		select {
		case ev := <-e.events:
			if ev.Change == change {
				return true
			}
		case <-ctx.Done():
			return false
		}
	}
}

// watched is an operation under watch: each channel is closed when it has come there.
type watched struct {
	performing, sending, verifying, ended chan struct{}
}

// watch follows an operation until it ends or its belayd does.
func (b *bed) watch(n *cluster.Node, id maint.OpID) *watched {
	w := &watched{make(chan struct{}), make(chan struct{}), make(chan struct{}), make(chan struct{})}
	once := func(c chan struct{}, is bool) {
		select {
		case <-c:
		default:
			if is {
				close(c)
			}
		}
	}
	ctx := b.ctx(5 * time.Minute)
	go func() {
		_, _ = n.Client().Watch(ctx, id, func(op maint.Op) {
			once(w.performing, op.Step == migrate.PhasePerform)
			once(w.sending, op.Progress != nil && op.Progress.MemorySent > 0)
			once(w.verifying, op.Step == migrate.PhaseVerify)
			once(w.ended, op.State == maint.OpEnded)
		})
	}()
	return w
}

// reach begins a migration from where the guest is to the other host and returns when
// it has come to the moment.
func (m *matrix) reach(at moment) maint.Op {
	m.t.Helper()
	m.here().listen(m.bed)
	m.there().listen(m.bed)
	ctx := m.ctx(time.Minute)
	// 1 MiB/s against 8: it cannot end by itself. Over a bad network it ends with a pause
	// of seconds.
	r := maint.MigrateRequest{Guest: "web-1", To: m.to.Name, BandwidthMiBs: 1, MaxPause: 10 * time.Second, Timeout: 4 * time.Minute}
	if at != copying && !late(at) {
		r.BandwidthMiBs = 0
	}
	if at == finishing { // from the start: BBR takes 10 s to notice that a way got longer
		m.link.Delay(20 * time.Millisecond)
	}
	op, err := m.from.Client().Migrate(ctx, r)
	if err != nil {
		m.t.Fatal(err)
	}
	w := m.watch(m.from, op.ID)
	until := func(c chan struct{}) {
		m.t.Helper()
		select {
		case <-c:
		case <-w.ended:
			if c != w.ended {
				op, _ = m.from.Client().Op(ctx, op.ID)
				m.t.Fatalf("the operation ended before the moment %q: %+v", at, op.Problems)
			}
		case <-ctx.Done():
			m.t.Fatalf("the moment %q does not come", at)
		}
	}
	hear := func(e *ear, change string) {
		m.t.Helper()
		if !e.heard(ctx, change) {
			m.t.Fatalf("the moment %q does not come: libvirt tells of none that has %s", at, change)
		}
	}
	switch at {
	case never, asked, checking:
		return op
	case before:
		until(w.performing)
		return op
	}
	until(w.sending)
	if at == copying {
		return op
	}
	m.hurry(at)
	switch at {
	case switching:
		hear(m.here(), "suspended")
	case finishing:
		hear(m.there(), "resumed")
	case confirming:
		hear(m.here(), "stopped")
	case verifying:
		until(w.verifying)
	}
	return op
}

// hurry lets a copy that was held back end, with room for what is to happen at the
// moment: what the guest has yet to send when its vCPUs stop takes a second or two over
// a narrow link, and the destination's last answer is on its way for a while.
func (m *matrix) hurry(at moment) {
	m.t.Helper()
	pause := "10000" // ms
	switch at {
	case switching:
		if err := m.from.Netem(m.ctx(10*time.Second), "tbf", "rate", "320mbit", "burst", "128kb", "latency", "100ms"); err != nil {
			m.t.Fatal(err)
		}
	case finishing: // and little is yet to be sent, by a TCP that knows the delay
		pause = "1000"
	}
	m.virsh(m.from, "migrate-setspeed", "web-1", "2000")
	m.virsh(m.from, "migrate-setmaxdowntime", "web-1", pause)
}

// unhurry takes back what hurry has done to the network.
func (m *matrix) unhurry() {
	m.t.Helper()
	m.link.Perfect()
	if err := m.from.Netem(m.ctx(10 * time.Second)); err != nil {
		m.t.Fatal(err)
	}
}
