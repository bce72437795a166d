package agent

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"belay/agent/api"
	"belay/agent/config"
	"belay/agent/maint"
	"belay/hypervisor"
	"belay/migrate"
	"belay/migrate/local"
)

const (
	greetEvery   = 30 * time.Second
	greetTimeout = 5 * time.Second
)

// peer is another host.
type peer struct {
	name   string
	cfg    config.Peer
	to     migrate.Destination
	client *api.Client
	last   atomic.Pointer[maint.PeerStatus]
	in     atomic.Int32 // how many guests it last said that it takes in at once; 0: not known
}

// takesIn is how many guests the peer takes in at once, 0 where that is not known.
func (p *peer) takesIn() int {
	if p == nil {
		return 0
	}
	return int(p.in.Load())
}

func newPeer(name string, cfg config.Peer, c *api.Client) *peer {
	p := &peer{name: name, cfg: cfg, to: c, client: c}
	p.last.Store(&maint.PeerStatus{Name: name, Address: cfg.Address, Error: "not asked yet"})
	return p
}

// greet keeps the peer's status fresh until ctx ends.
func (p *peer) greet(ctx context.Context, log *slog.Logger) {
	t := time.NewTicker(greetEvery)
	defer t.Stop()
	defer p.client.Close()
	for {
		was := p.last.Load()
		if now := p.ask(ctx); ctx.Err() == nil && (now.OK != was.OK || was.Checked.IsZero()) {
			if now.OK {
				log.Info("peer answers", "peer", p.name, "version", now.Version)
			} else {
				log.Warn("peer does not answer", "peer", p.name, "err", now.Error)
			}
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}

// ask greets the peer once and keeps what it says.
func (p *peer) ask(ctx context.Context) maint.PeerStatus {
	ctx, cancel := context.WithTimeout(ctx, greetTimeout)
	defer cancel()
	s := maint.PeerStatus{Name: p.name, Address: p.cfg.Address}
	begun := time.Now()
	g, err := p.client.Greeting(ctx)
	s.Checked, s.Latency = time.Now(), time.Since(begun)
	if err != nil {
		s.Error = err.Error()
	} else {
		s.OK, s.HostUUID, s.Version, s.Cordoned = true, g.Host.UUID, g.Version, g.Cordoned
		// The peer read its clock half a round trip ago, give or take that.
		s.ClockOffset = g.Now.Sub(begun.Add(s.Latency / 2))
	}
	p.last.Store(&s)
	return s
}

func (a *Agent) peerNames() []string { return slices.Sorted(maps.Keys(a.peers)) }

// source gives package migrate this host in its own terms.
type source struct {
	Hypervisor
	*local.Host
}

// Describe implements migrate.Describer.
func (s source) Describe(ctx context.Context, uuid string) (migrate.Description, error) {
	x, err := s.GuestXML(ctx, uuid)
	if err != nil {
		return migrate.Description{}, err
	}
	n, err := hypervisor.ParseNeeds(x.Live, x.Migratable)
	return migrate.Description{CPUXML: x.CPU, Inactive: x.Inactive, Needs: n.Needs, Pages: n.Pages, Bound: n.Bound, Unsafe: n.Unsafe}, err
}

// MoveSupport implements migrate.Supporter.
func (s source) MoveSupport(ctx context.Context, uuid string) (maint.MoveSupport, error) {
	return hypervisor.MoveSupport(ctx, s.Hypervisor, uuid)
}

// Severed implements migrate.Parter.
func (s source) Severed(ctx context.Context, uuid string) (bool, error) {
	return hypervisor.Severed(ctx, s.Hypervisor, uuid)
}

// HoldConnections implements migrate.Parter. Both hosts are taken to have the same ports for migrations.
func (s source) HoldConnections(ctx context.Context, uuid string, port uint16) ([]maint.Connection, error) {
	first, last := port, port
	if port == 0 {
		w := s.Wiring()
		first, last = w.First, w.Last
	}
	return s.HoldOut(ctx, uuid, first, last)
}

// Suspended implements migrate.Supporter.
func (s source) Suspended(ctx context.Context, uuid string) (bool, error) {
	return hypervisor.SuspendedInCopy(ctx, s.Hypervisor, uuid)
}

// lostPeer stands for a peer that was taken out of the configuration while an
// operation with it was open: it can be asked nothing.
type lostPeer struct{ why *maint.Problem }

func (l lostPeer) err() error { return fmt.Errorf("%w: %w", maint.ErrPeerDown, l.why) }

func (l lostPeer) Check(context.Context, maint.Arrival) ([]maint.Problem, error) {
	return nil, l.err()
}
func (l lostPeer) Reserve(context.Context, maint.Arrival) (maint.Landing, error) {
	return maint.Landing{}, l.err()
}
func (l lostPeer) Release(context.Context, maint.OpID) error        { return l.err() }
func (l lostPeer) View(context.Context, string) (maint.View, error) { return maint.View{}, l.err() }
func (l lostPeer) Connections(context.Context, maint.OpID, maint.Connections) error {
	return l.err()
}
func (l lostPeer) Settle(context.Context, maint.Settlement) error { return l.err() }
func (l lostPeer) CompletedJob(context.Context, string) (maint.Job, error) {
	return maint.Job{}, l.err()
}

func (l lostPeer) CheckFiles(context.Context, maint.FilesQuestion) ([]maint.FileView, error) {
	return nil, l.err()
}
func (l lostPeer) MakeDisks(context.Context, maint.OpID) error   { return l.err() }
func (l lostPeer) RemoveDisks(context.Context, maint.OpID) error { return l.err() }

// disksOf is a destination as copies of disks have it.
func disksOf(p *peer, to migrate.Destination) migrate.DiskHost {
	if c, ok := to.(carrying); ok {
		to = c.Destination
	}
	if lost, ok := to.(lostPeer); ok {
		return lost
	}
	return p.client
}
