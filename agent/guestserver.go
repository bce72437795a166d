package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	"belay/agent/maint"
	"belay/notify"
	"belay/notify/board"
	"belay/notify/channel"
	"belay/notify/channel/wire"
	"belay/notify/identity"
	"belay/notify/views"
)

// guestServer answers guests. Those on a bridge are known by their tap, others by
// their vsock CID or virtio-serial channel.
type guestServer struct {
	agent    *Agent
	handler  *views.Handler
	gate     *identity.Gate // nil where it could not be opened
	channels *channel.Listener

	// setting serialises who says which CIDs there are.
	setting sync.Mutex
	cids    map[uint32]string

	mu       sync.Mutex
	problems map[string]error // what does not work, by what it is about
	serial   map[string]serial
	addrs    map[string]guestAddrs
}

// serial is a guest's virtio-serial channel that is served.
type serial struct {
	socket string // another for each QEMU that libvirt starts
	end    context.CancelFunc
}

// guestAddrs is what a guest's agent has said of its interfaces.
type guestAddrs struct {
	asked time.Time
	byMAC map[string][]netip.Addr
}

// drainFor is for how long a guest that moves is kept from waiting for events: its
// connections stay behind. It is said anew as long as the copy goes on.
const drainFor = 5 * time.Second

// drainTimeout bounds how long a guest's answers that are being sent hold up what
// moves it.
const drainTimeout = 200 * time.Millisecond

// ServeGuests tells guests of their events until ctx ends. What of it cannot be
// had, say because another metadata service is on the host, is a condition of the
// host, and the rest is served.
func (a *Agent) ServeGuests(ctx context.Context) error {
	if !a.cfg.Events.Enabled {
		<-ctx.Done()
		return nil
	}
	s := &guestServer{agent: a, problems: make(map[string]error), serial: make(map[string]serial), addrs: make(map[string]guestAddrs)}
	var upstream *url.URL
	if to := a.cfg.Events.Upstream; to != "" {
		var err error
		if upstream, err = url.Parse(to); err != nil {
			return err
		}
	}
	s.handler = views.New(views.Config{Source: guestSource{a.keeper, s}, Log: a.log, Upstream: upstream,
		EC2: views.EC2{IMDSv1: a.cfg.Events.IMDSv1, ShowFreeze: a.cfg.Events.EC2ShowsFreeze}})
	a.guests.Store(s)
	var parts sync.WaitGroup
	s.channels = channel.NewListener(a.log)
	s.serve(ctx, &parts, s.channels, channel.ConnContext)
	if err := channel.VsockSupported(); err != nil {
		a.log.Info("no guest can ask by vsock", "err", err)
	} else if in, err := channel.ListenVsock(wire.VsockPort); err != nil {
		s.note("vsock", err)
	} else {
		parts.Go(func() { s.note("vsock", unlessOver(ctx, s.channels.ServeVsock(in))) })
	}
	if err := s.openGate(ctx, &parts); err != nil {
		s.note("169.254.169.254", err)
	}
	parts.Go(func() { s.followEnds(ctx) })
	parts.Go(func() { s.followAddrs(ctx) })
	if program := a.cfg.Events.Wake; program != "" {
		parts.Go(func() { s.wake(ctx, program) })
	}
	s.follow(ctx)
	s.handler.Stop()
	var err error
	if s.gate != nil {
		err = s.gate.Close()
	}
	_ = s.channels.Close() // says that it is closed
	parts.Wait()
	return err
}

func (s *guestServer) openGate(ctx context.Context, parts *sync.WaitGroup) error {
	gate, err := identity.Open(identity.Config{Log: s.agent.log})
	if err != nil {
		return err
	}
	in, err := gate.Listen(ctx)
	if err != nil {
		return errors.Join(err, gate.Close())
	}
	if err := gate.Set(ctx, nil); err != nil { // nobody, until all are listed
		return errors.Join(err, gate.Close())
	}
	s.gate = gate
	s.serve(ctx, parts, in, gate.ConnContext)
	return nil
}

// serve answers who comes by a listener, until that is closed or ctx ends.
func (s *guestServer) serve(ctx context.Context, parts *sync.WaitGroup, in net.Listener, who func(context.Context, net.Conn) context.Context) {
	server := views.NewServer(s.handler)
	server.ConnContext = who
	parts.Go(func() { s.note("listener "+in.Addr().String(), unlessOver(ctx, server.Serve(in))) })
	parts.Go(func() {
		<-ctx.Done()
		end, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if server.Shutdown(end) != nil {
			_ = server.Close()
		}
	})
}

// unlessOver is err, unless everything is ending anyway.
func unlessOver(ctx context.Context, err error) error {
	if ctx.Err() != nil || errors.Is(err, http.ErrServerClosed) || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// note keeps what does not work, and says so once; nil: it does.
func (s *guestServer) note(what string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	was := s.problems[what]
	if err == nil {
		delete(s.problems, what)
		return
	}
	if was == nil || was.Error() != err.Error() {
		s.agent.log.Error("guests cannot be told of their events", "by", what, "err", err)
	}
	s.problems[what] = err
}

// conditions are what does not work.
func (s *guestServer) conditions() (cs []maint.Condition) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for what, err := range s.problems {
		cs = append(cs, maint.Condition{Code: maint.CodeGuestsUntold, Text: fmt.Sprintf("guests cannot be told of their events by %s: %v", what, err),
			Remedy: "see 'belay doctor' for rung C; guests that cannot ask have their full notice all the same"})
	}
	return cs
}

// follow keeps up with which guests there are.
func (s *guestServer) follow(ctx context.Context) {
	defer func() {
		for _, c := range s.serial {
			c.end()
		}
	}()
	for ctx.Err() == nil {
		changed := s.agent.view.changed()
		snap := s.agent.view.last.Load()
		if snap.err == nil {
			s.update(ctx, snap.guests)
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
}

// update has exactly the guests that run be known.
func (s *guestServer) update(ctx context.Context, guests []maint.Guest) {
	var ports []identity.Port
	cids := make(map[uint32]string)
	sockets := make(map[string]string)
	for _, g := range guests {
		if !g.State.Active() {
			continue
		}
		for _, d := range g.Devices {
			switch {
			case d.Kind == "interface" && (d.Type == "bridge" || d.Type == "network") && d.Target != "":
				if p, ok := port(g, d); ok {
					ports = append(ports, p)
				}
			case d.Kind == "vsock" && d.CID != 0:
				cids[d.CID] = g.UUID
			case d.Kind == "channel" && d.Target == wire.Name && d.Source != "":
				sockets[g.UUID] = d.Source
			}
		}
	}
	if s.gate != nil {
		s.note("169.254.169.254", s.gate.Set(ctx, ports))
	}
	s.setCIDs(cids)
	for uuid, c := range s.serial {
		if sockets[uuid] != c.socket {
			c.end()
			delete(s.serial, uuid)
		}
	}
	for uuid, socket := range sockets {
		if _, served := s.serial[uuid]; !served {
			on, end := context.WithCancel(ctx)
			s.serial[uuid] = serial{socket, end}
			go s.channels.Connect(on, uuid, socket)
		}
	}
}

// setCIDs says which guests have which CIDs.
func (s *guestServer) setCIDs(cids map[uint32]string) {
	s.setting.Lock()
	defer s.setting.Unlock()
	s.cids = cids
	s.note("vsock's CIDs", s.channels.SetCIDs(cids))
}

// followEnds takes a guest's CID from it as soon as it stops: libvirt may give it to
// the next one that starts, before all are listed again.
func (s *guestServer) followEnds(ctx context.Context) {
	events, cancel := s.agent.hyp.Subscribe()
	defer cancel()
	for {
		select {
		case e, open := <-events:
			if !open {
				return
			}
			if e.Kind != maint.EventLifecycle || e.Change != "stopped" {
				continue
			}
			s.setting.Lock()
			s.cids = maps.Clone(s.cids)
			maps.DeleteFunc(s.cids, func(_ uint32, uuid string) bool { return uuid == e.UUID })
			s.note("vsock's CIDs", s.channels.SetCIDs(s.cids))
			s.setting.Unlock()
		case <-ctx.Done():
			return
		}
	}
}

// port is a guest's interface on the host's side; false: its tap has gone, or is on
// no Linux bridge.
func port(g maint.Guest, d maint.Device) (p identity.Port, ok bool) {
	tap, err := net.InterfaceByName(d.Target)
	if err != nil || !identity.OnBridge(tap.Index) {
		return p, false
	}
	mac, err := net.ParseMAC(d.MAC)
	if err != nil {
		return p, false
	}
	return identity.Port{Guest: g.UUID, Ifindex: tap.Index, Tap: tap.Name, Bridge: d.Source, MAC: mac}, true
}

const (
	// addrsEvery is how often a guest is asked for its addresses, and addrsTimeout
	// how long.
	addrsEvery   = 5 * time.Minute
	addrsTimeout = 3 * time.Second
	// maxAddrs bounds those of an interface: the guest says how many it has, and
	// asks for them as often as it likes.
	maxAddrs = 64
)

// followAddrs keeps up with the addresses of guests, for what they are told of
// themselves. It is apart from who they are: an agent can be slow.
func (s *guestServer) followAddrs(ctx context.Context) {
	for ctx.Err() == nil {
		changed := s.agent.view.changed()
		s.askAddrs(ctx, s.agent.view.last.Load().guests)
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
}

// askAddrs asks guests that have an agent.
func (s *guestServer) askAddrs(ctx context.Context, guests []maint.Guest) {
	for _, g := range guests {
		s.mu.Lock()
		due := time.Since(s.addrs[g.UUID].asked) > addrsEvery
		s.mu.Unlock()
		if !due || g.State != maint.GuestRunning || g.Agent != maint.AgentConnected {
			continue
		}
		asked := guestAddrs{asked: time.Now()}
		one, cancel := context.WithTimeout(ctx, addrsTimeout)
		answer, err := s.agent.hyp.AgentCommand(one, g.UUID, "guest-network-get-interfaces", nil)
		cancel()
		if err == nil {
			asked.byMAC = addresses(answer)
		}
		s.mu.Lock()
		s.addrs[g.UUID] = asked
		s.mu.Unlock()
	}
}

// addresses reads the answer to guest-network-get-interfaces (QEMU guest agent
// protocol), by MAC in lower case.
func addresses(answer json.RawMessage) map[string][]netip.Addr {
	var all []struct {
		MAC   string `json:"hardware-address"`
		Addrs []struct {
			IP string `json:"ip-address"`
		} `json:"ip-addresses"`
	}
	if json.Unmarshal(answer, &all) != nil {
		return nil
	}
	byMAC := make(map[string][]netip.Addr)
	for _, i := range all {
		for _, a := range i.Addrs {
			mac := strings.ToLower(i.MAC)
			if ip, err := netip.ParseAddr(a.IP); err == nil && !ip.IsLoopback() && ip.Zone() == "" && len(byMAC[mac]) < maxAddrs {
				byMAC[mac] = append(byMAC[mac], ip)
			}
		}
	}
	return byMAC
}

// answerPolls has a guest's long polls answered before it moves.
func (a *Agent) answerPolls(ctx context.Context, uuid string) {
	s := a.guests.Load()
	if s == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	if err := s.handler.Drain(ctx, uuid, drainFor); err != nil {
		a.log.Info("a guest's long polls were not all answered before it moves", "guest", uuid, "err", err)
	}
}

// guestSource is what guests can ask for and do.
type guestSource struct {
	*board.Keeper
	server *guestServer
}

// Instance implements notify.Source.
func (s guestSource) Instance(uuid string) (notify.Instance, bool) {
	for _, g := range s.server.agent.view.last.Load().guests {
		if g.UUID != uuid {
			continue
		}
		i := notify.Instance{Name: g.Name, UUID: uuid}
		s.server.mu.Lock()
		known := s.server.addrs[uuid].byMAC
		s.server.mu.Unlock()
		for _, d := range g.Devices {
			if d.Kind == "interface" && d.MAC != "" {
				i.Interfaces = append(i.Interfaces, notify.Interface{MAC: d.MAC, Addrs: known[strings.ToLower(d.MAC)]})
			}
		}
		return i, true
	}
	return notify.Instance{}, false
}

// doctorC says what is missing for rung C.
func (a *Agent) doctorC(ctx context.Context) []maint.Check {
	s := a.guests.Load()
	if s == nil {
		return []maint.Check{{Rung: "C", Name: "scheduled events", Result: maint.CheckNA, Text: "guests are told nothing beforehand",
			Remedy: "set events.enabled in belayd's configuration"}}
	}
	checks := []maint.Check{}
	for _, k := range s.conditions() {
		checks = append(checks, maint.Check{Rung: "C", Name: "scheduled events", Result: maint.CheckFail, Text: k.Text, Remedy: "see docs/rung-c-events.md"})
	}
	if s.gate != nil {
		checks = append(checks, s.gate.Check(ctx)...)
	}
	c := maint.Check{Rung: "C", Name: "vsock", Result: maint.CheckOK, Text: "guests can ask by vsock"}
	if err := channel.VsockSupported(); err != nil {
		c.Result, c.Text = maint.CheckNA, err.Error()
	}
	return append(checks, c)
}
