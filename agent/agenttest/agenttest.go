// Package agenttest runs whole agents on hosts that exist in memory only: real
// journal, real API over unix sockets and mutual TLS on loopback, everything
// but libvirt. An agent can be killed at any call and started again.
package agenttest

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"belay/agent"
	"belay/agent/api"
	"belay/agent/boottime"
	"belay/agent/config"
	"belay/agent/journal"
	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
	"belay/notify/board"
	"belay/patch/kexec"
	"belay/patch/kexec/kexectest"
	"belay/patch/live"
	"belay/patch/live/livetest"
	"belay/patch/pending"
	"belay/patch/preserve/preservetest"
	"belay/patch/vmm"
	"belay/patch/vmm/vmmtest"
	"belay/vmtests/pki"
)

// Node is one host with its agent.
type Node struct {
	Host   *hypervisortest.Host
	Config config.Config
	Client *api.Client // as root on the unix socket
	Agent  *agent.Agent
	CA     pki.CA
	// Leashes and Steps are the host's: they outlive the agent.
	Leashes *preservetest.Leashes
	Steps   *preservetest.Steps
	// Clocks are its guests', for agents that are started from then on.
	Clocks agent.Clocks
	// Root is the host's root folder, as far as its guests between two QEMUs
	// are concerned, and LeashDir where leashes leave what they leave.
	Root, LeashDir string
	// Machine, if set, is Host with QEMUs that can be replaced; Twin, if set,
	// is its second libvirt daemon. Both are for agents that are started from
	// then on.
	Machine *vmmtest.Machine
	Twin    *Second
	// Pending looks for newer packages; for agents that are started from then on.
	Pending pending.Host
	// Shutdown, if set, is asked to wait; for agents that are started from then on.
	Shutdown agent.Shutdown
	// Kexec, if set, is Host with kernels, for agents that are started from then on.
	Kexec *kexectest.Machine
	// Boot names the host's boot, for agents that are started from then on.
	Boot string
	// Kernel is the host's; it outlives the agent.
	Kernel *livetest.Machine
	// QEMUs are its guests', as far as they take livepatches; they outlive the agent.
	QEMUs *livetest.Programs
	// Timing is how livepatches are timed by agents that are started from then on.
	Timing live.Timing

	t       testing.TB
	log     *slog.Logger
	journal *journal.Journal
	servers *api.Servers
	stop    context.CancelFunc
	stopped chan struct{}
	life    *life
	living  atomic.Pointer[life]  // life, for whoever outlives the agent
	failing atomic.Pointer[error] // of the journal's appends
}

// FailJournal has the journal refuse to write from now on, as on a full disk;
// nil makes it good again.
func (n *Node) FailJournal(err error) {
	if err == nil {
		n.failing.Store(nil)
		return
	}
	n.failing.Store(&err)
}

// life is one life of an agent. When it is over, every goroutine of the agent
// that calls its host or its journal ends right there, as in a killed process.
type life struct {
	over atomic.Bool
	hook func(what string)
}

// step is called before and after everything that leaves the agent.
func (l *life) step(what string) {
	if l.over.Load() {
		runtime.Goexit()
	}
	if l.hook != nil {
		l.hook(what)
	}
	if l.over.Load() {
		runtime.Goexit()
	}
}

// mortalJournal is a journal whose agent can be killed before and after each
// append.
type mortalJournal struct {
	*journal.Journal
	node *Node
	life *life
}

func (m mortalJournal) Append(r ...maint.Record) error {
	last := r[len(r)-1] // what comes next, after a step's end
	what := "append " + string(last.Kind) + " " + last.Step
	m.life.step("before " + what)
	if err := m.node.failing.Load(); err != nil {
		return *err
	}
	err := m.Journal.Append(r...)
	m.life.step("after " + what)
	return err
}

func (m mortalJournal) Health() error {
	if err := m.node.failing.Load(); err != nil {
		return *err
	}
	return m.Journal.Health()
}

// World is hosts in memory with an agent each, every one the others' peer.
type World struct {
	*hypervisortest.World
	Nodes []*Node
}

// New makes a world of the named hosts, with copies that take tens of
// milliseconds, and starts their agents. edit may change a node's
// configuration before its agent starts.
func New(t testing.TB, log *slog.Logger, edit func(*config.Config), names ...string) *World {
	t.Helper()
	return NewOn(t, log, nil, edit, names...)
}

// NewOn is New on hosts that are described by name, as the defaults have it
// where they are not.
func NewOn(t testing.TB, log *slog.Logger, hosts map[string]hypervisortest.HostOptions, edit func(*config.Config), names ...string) *World {
	t.Helper()
	w := &World{World: hypervisortest.NewWorld()}
	t.Cleanup(w.Close)
	w.SetCopy(hypervisortest.Copy{Passes: 2, Step: 10 * time.Millisecond, Blackout: 5 * time.Millisecond})
	dir, err := os.MkdirTemp("", "belay") // short: unix sockets are in it
	check(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	ca, err := pki.New(dir, "agents under test")
	check(t, err)
	addrs := make(map[string]string)
	for _, name := range names {
		check(t, ca.IssueHost(name))
		// An address of its own keeps the port free between the agent's
		// lives: ports of outgoing connections are taken on 127.0.0.1.
		own := netip.AddrFrom4([4]byte{127, byte(1 + rand.IntN(250)), byte(rand.IntN(256)), byte(1 + rand.IntN(250))})
		l, err := net.Listen("tcp", netip.AddrPortFrom(own, 0).String())
		check(t, err)
		addrs[name] = l.Addr().String()
		check(t, l.Close())
	}
	for _, name := range names {
		home := filepath.Join(dir, name)
		options := hosts[name]
		options.Root = filepath.Join(home, "root")
		n := &Node{t: t, log: log.With("host", name), CA: ca, Boot: "boot-1", Host: w.AddHost(name, options)}
		alive := func() bool { l := n.living.Load(); return l != nil && !l.over.Load() }
		n.Leashes, n.Steps = &preservetest.Leashes{Host: n.Host, Alive: alive}, &preservetest.Steps{}
		check(t, os.Mkdir(home, 0o700))
		n.Root, n.LeashDir = options.Root, filepath.Join(home, "leash")
		n.Config = config.Config{
			Host: name, StateDir: filepath.Join(home, "state"), RunDir: "/run",
			API:       config.API{Socket: filepath.Join(home, "sock"), Listen: addrs[name]},
			TLS:       config.TLS{CA: ca.CertFile("ca"), Cert: ca.CertFile(name), Key: ca.KeyFile(name)},
			Access:    config.Access{OperatorCerts: []string{"ops"}, ViewerCerts: []string{"eyes"}},
			Limits:    config.Limits{MigrationsOut: 4, MigrationsIn: 4},
			Migration: config.Migration{Timeout: config.Duration{Duration: time.Minute}, CopyDisks: maint.CopyNone},
			Hold: config.Hold{MaxPause: config.Duration{Duration: 10 * time.Second}, MaxPauseLimit: config.Duration{Duration: time.Minute},
				CommandsBy: "root", Leash: "/bin/true"}, // the leashes are in memory
			Patch:   config.Patch{AutoLoad: true, Components: []string{"libvirtd.service", "virtlogd.service"}},
			Journal: config.Journal{Keep: config.Duration{Duration: time.Hour}},
			Peers:   make(map[string]config.Peer),
		}
		for _, peer := range names {
			if peer != name {
				n.Config.Peers[peer] = config.Peer{Address: addrs[peer], CertName: peer, LibvirtURI: "qemu+tcp://" + peer + "/system"}
			}
		}
		if edit != nil {
			edit(&n.Config)
		}
		n.Clocks = preservetest.Clocks{}
		n.Timing = live.Timing{Poll: time.Millisecond, Name: 20 * time.Millisecond, Limit: 20 * time.Second, Back: 20 * time.Second, Soak: 10 * time.Millisecond}
		n.Kernel = livetest.New(t, filepath.Join(home, "kernel"), livetest.Debian12())
		n.QEMUs = livetest.NewPrograms(n.Kernel.Keys)
		n.Client = api.NewUnix(n.Config.API.Socket)
		w.Nodes = append(w.Nodes, n)
		n.Start(nil)
		t.Cleanup(n.Stop)
	}
	return w
}

// Start starts the node's agent. hook, if any, is told everything that leaves
// the agent, and may Kill it there.
func (n *Node) Start(hook func(what string)) {
	n.t.Helper()
	var err error
	n.life = &life{hook: hook}
	n.journal, err = journal.Open(n.Config.StateDir)
	check(n.t, err)
	id, err := api.LoadIdentity(n.Config.TLS.CA, n.Config.TLS.Cert, n.Config.TLS.Key)
	check(n.t, err)
	n.living.Store(n.life)
	b := agent.Preserve{Leash: mortalLeash{n.Leashes, n.LeashDir, n.life}, Steps: n.Steps, Clocks: n.Clocks, Places: vmm.Places{Root: n.Root},
		Boot: board.Boot{ID: n.Boot, Since: boottime.Now}, Live: n.live(), Shutdown: n.Shutdown, Pending: n.Pending}
	var hyp agent.Hypervisor = n.Host
	if n.Machine != nil {
		hyp, b.Places = n.Machine, n.Machine.Places()
	}
	if n.Kexec != nil {
		hyp, b.Places = n.Kexec, n.Kexec.Places()
		k := mortalKexec{n.Kexec, n.life}
		b.Kexec = agent.Kexec{Tree: n.Kexec.Tree(), Dir: kexec.DefaultDir, Loader: k, Rebooter: k,
			Pace: kexec.Pace{Poll: time.Millisecond, Going: 100 * time.Millisecond, Healed: 200 * time.Millisecond}}
	}
	if n.Twin != nil {
		b.Twin = n.Twin.twin(n.life)
	}
	n.Agent = agent.New(n.Config, "test", mortalHost{hyp, n.life}, mortalJournal{n.journal, n, n.life}, b, id.Client, n.log)
	n.servers = api.NewServers(n.log)
	who := api.Access{OperatorCerts: n.Config.Access.OperatorCerts, ViewerCerts: n.Config.Access.ViewerCerts}
	for name := range n.Config.Peers {
		who.PeerCerts = append(who.PeerCerts, name)
	}
	check(n.t, n.servers.ListenUnix(n.Config.API.Socket, n.Agent, who))
	check(n.t, n.listenTLS(id, who))
	n.servers.Serve(make(chan error, 2))
	n.Client.Close() // what is asked of this life must not go down a connection of the one before
	ctx, cancel := context.WithCancel(context.Background())
	n.stop, n.stopped = cancel, make(chan struct{})
	go func(a *agent.Agent, stopped chan struct{}) {
		defer close(stopped)
		_ = a.Run(ctx)
	}(n.Agent, n.stopped)
}

// live is the node's kernel as its agent in this life has it.
func (n *Node) live() agent.Live {
	k := mortalKernel{n.Kernel, n.life}
	return agent.Live{BootID: n.Kernel.BootID(), Microcode: n.Kernel, QEMU: func(string) int { return 4711 },
		Process: n.QEMUs.Process, UserSpace: mortalPrograms{n.QEMUs, n.life}, Containers: live.Store{Dir: filepath.Join(n.Config.StateDir, "qemu-live"), Ext: ".so"},
		Host: live.Host{Tree: n.Kernel.Tree, Kernel: k, Witness: n.Kernel, Keys: n.Kernel.Keys, Timing: n.Timing,
			Store: live.Store{Dir: filepath.Join(n.Config.StateDir, "live")}}}
}

// listenTLS waits for the port, which an outgoing connection of anybody's, or the
// agent's life before, may have for a moment.
func (n *Node) listenTLS(id api.Identity, who api.Access) (err error) {
	for range 100 {
		err = n.servers.ListenTLS(n.Config.API.Listen, id, n.Agent, who)
		if !errors.Is(err, syscall.EADDRINUSE) {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
	return err
}

// Stop shuts the agent down in order.
func (n *Node) Stop() {
	if n.life.over.Load() {
		return
	}
	n.stop()
	closeNow(n.servers)
	<-n.stopped
	n.life.over.Store(true)
	n.journal.Close()
}

// Kill ends the agent's life at once: nothing that it has begun goes any
// further, but for what libvirt does on its own.
func (n *Node) Kill() {
	n.life.over.Store(true)
	n.stop() // ends timers; whatever wakes up ends at its next step
	servers := n.servers
	go closeNow(servers)
}

// Crash is the host's going down, agent and all, and its coming back without an agent yet.
func (n *Node) Crash() {
	n.Kill()
	n.Host.Reboot()
	n.Boot += "+"
}

// Restart starts a killed agent again.
func (n *Node) Restart() { n.RestartWith(nil) }

// RestartWith is Restart with a hook; see Start.
func (n *Node) RestartWith(hook func(what string)) {
	closeNow(n.servers)
	n.journal.Close()
	n.Start(hook)
}

// closeNow cuts what is being served.
func closeNow(s *api.Servers) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	s.Close(ctx)
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Alive reports whether the node's agent lives.
func (n *Node) Alive() bool { return !n.life.over.Load() }
