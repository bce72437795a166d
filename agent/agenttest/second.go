package agenttest

import (
	"context"
	"encoding/json"
	"slices"

	"belay/agent"
	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
	"belay/patch/preserve/preservetest"
	"belay/patch/vmm/twin"
)

// Second is a twin whose libvirt is a host in memory. It outlives the agent.
type Second struct {
	Home, Away *hypervisortest.Host
	// Full, if set, says that a guest's memory has no room a second time.
	Full bool

	leashes *preservetest.Leashes
}

// AddTwin gives the world a host that is a node's twin.
func (w *World) AddTwin(n *Node) *Second {
	name := n.Host.Name() + ".belay-twin"
	away := w.AddHost(name, hypervisortest.HostOptions{})
	alive := func() bool { l := n.living.Load(); return l != nil && !l.over.Load() }
	for _, h := range []*hypervisortest.Host{n.Host, away} {
		h.OnQMP(migrates)
	}
	n.Twin = &Second{Home: n.Host, Away: away, leashes: &preservetest.Leashes{Host: away, Alive: alive}}
	return n.Twin
}

// migrates answers what is asked of a QEMU that is live migrated.
func migrates(_, command string, _ json.RawMessage) (any, bool, error) {
	switch command {
	case "query-migrate-capabilities":
		return []any{}, true, nil
	case "migrate-set-parameters", "query-migrate":
		return map[string]any{}, true, nil
	}
	return nil, false, nil
}

// Stray has a running guest be in the twin, with nothing that tells why.
func (s *Second) Stray(ctx context.Context, uuid string) error {
	return s.Home.Migrate(ctx, uuid, s.Route(uuid, true))
}

func (s *Second) twin(l *life) *agent.Twin {
	return &agent.Twin{Second: s, Away: mortalHost{s.Away, l}, Leash: mortalLeash{s.leashes, "", l}}
}

// Start implements twin.Daemon.
func (s *Second) Start(ctx context.Context) error { return ctx.Err() }

// Stop implements twin.Daemon.
func (s *Second) Stop(context.Context) error {
	if guests, err := s.Guests(); err != nil || len(guests) > 0 {
		return maint.Problemf(maint.CodeBusy, "host", "", "guests are in the twin: %v (%v)", guests, err)
	}
	return nil
}

// Guests implements twin.Daemon.
func (s *Second) Guests() (names []string, err error) {
	guests, err := s.Away.Guests(context.Background())
	for _, g := range guests {
		names = append(names, g.Name)
	}
	slices.Sort(names)
	return names, err
}

// Route implements twin.Ways.
func (s *Second) Route(_ string, out bool) maint.MoveParams {
	if out {
		return maint.MoveParams{DestURI: s.Away.URI(), SameHost: true}
	}
	return maint.MoveParams{DestURI: s.Home.URI(), SameHost: true}
}

// Incoming implements twin.Ways.
func (s *Second) Incoming(uuid string) string { return "/in/" + uuid }

// Fit implements twin.Ground.
func (s *Second) Fit(twin.Need) (twin.Guard, []maint.Problem, error) {
	return twin.Guard{By: []string{"the test"}}, nil, nil
}

// Room implements twin.Ground.
func (s *Second) Room(guest string, _ uint64, _ bool) ([]maint.Problem, error) {
	if s.Full {
		return []maint.Problem{*maint.Problemf(maint.CodeNoRoom, "guest "+guest, "make room", "does not fit twice")}, nil
	}
	return nil, nil
}

// Lend implements twin.Ground.
func (s *Second) Lend(string, bool, string, []string) error { return nil }

// Sink implements twin.Ground.
func (s *Second) Sink(string) (string, func(), error) { return "/sink", func() {}, nil }
