package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"belay/agent/agenttest"
	"belay/agent/config"
	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
	"belay/patch/live/livetest"
	"belay/patch/pending"
)

// The scripts in testdata/script run belay as a process of its own, against
// two whole agents, a and b, on hosts in memory. Beside testscript's commands
// they have:
//
//	world new [port=open|closed]  two hosts, web-1 and web-2 on a; $BELAY_SOCKET is a's.
//	                              The port is libvirt's, which only doctor knocks at.
//	world tell                    from now on a tells its guests
//	world event                   wait until one is scheduled on a; $EVENT is the latest
//	world pause|off GUEST         on a
//	world taken GUEST             b has another guest of that name
//	world device GUEST XML        on a
//	world hold                    copies do not end …
//	world release                 … until now
//	world copying                 wait until a copy has begun
//	world kill-libvirt HOST       returns when its agent knows
//	world stop HOST               its belayd
//	world op                      $OP is the newest operation on a
//	world drain-op, apply-op      $OP is the newest drain, or apply, on a
//	world patch NAME              a livepatch for a's kernel, by a vendor whom it trusts; $PATCH is its file
//	world qemu-patch NAME         a livepatch of QEMU, likewise; web-1's takes it, and web-2's is a stock one
//	world pending FILE            a's package manager says what is in it
//	world crowd N                 so many more guests on a, which may not move
//	world large FILE              a file that is larger than any plan
//	world cut FILE                has half of it from now on
//	world straggler               a task of a's holds up every livepatch
//	world runs GUEST HOST         it runs there, and on no other host
//	code N belay …                belay exits with N
//	json PATH WANT                in the last standard output; PATH is like guests.0.name
//	start belay …                 in the background
//	says REGEXP                   wait for that in what it writes
//	ends N [interrupt]            it exits with N, after a SIGINT

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"belay": main})
}

func TestScripts(t *testing.T) {
	t.Parallel()
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			e.Setenv("TZ", "UTC")
			e.Setenv("GORACE", "atexit_sleep_ms=0") // or each belay takes a second to exit
			e.Setenv("BELAY_SOCKET", filepath.Join(e.WorkDir, "no-belayd.sock"))
			e.Values["stage"] = &stage{t: e.T().(testing.TB)}
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"world": func(s *testscript.TestScript, _ bool, args []string) { on(s).command(s, args) },
			"code":  code,
			"json":  jsonField,
			"start": func(s *testscript.TestScript, _ bool, args []string) { on(s).begin(s, args) },
			"says":  func(s *testscript.TestScript, _ bool, args []string) { on(s).says(s, args[0]) },
			"ends":  func(s *testscript.TestScript, _ bool, args []string) { on(s).ends(s, args) },
		},
		RequireExplicitExec: true,
	})
}

// patience is far more than anything here takes.
const patience = 30 * time.Second

// stage is what one script plays on.
type stage struct {
	t       testing.TB
	world   *agenttest.World
	uuids   map[string]string // of a's guests, by name
	copying chan struct{}
	vendor  *livetest.Vendor

	background *exec.Cmd
	written    *lookup // by it
}

func on(s *testscript.TestScript) *stage { return s.Value("stage").(*stage) }

func (p *stage) node(s *testscript.TestScript, name string) *agenttest.Node {
	for _, n := range p.world.Nodes {
		if n.Host.Name() == name {
			return n
		}
	}
	s.Fatalf("there is no host %q", name)
	return nil
}

// trusted is the vendor whom a host trusts.
func (p *stage) trusted(a *agenttest.Node) *livetest.Vendor {
	if p.vendor == nil {
		p.vendor = livetest.NewVendor(p.t)
		p.vendor.Trust(a.Kernel.Keys)
	}
	return p.vendor
}

func (p *stage) command(s *testscript.TestScript, args []string) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	verb, rest := args[0], args[1:]
	arg := func(i int) string {
		if i >= len(rest) {
			s.Fatalf("world %s needs more arguments", verb)
		}
		return rest[i]
	}
	if verb == "new" {
		p.create(s, rest)
		return
	}
	a := p.world.Nodes[0]
	switch verb {
	case "tell":
		a.Config.Events = config.Events{Enabled: true, Policy: "all"}
		a.Stop()
		a.Start(nil)
	case "event":
		found := errors.New("found")
		err := a.Client.WatchEvents(ctx, false, func(all []maint.ScheduledEvent) error {
			if len(all) == 0 {
				return nil
			}
			s.Setenv("EVENT", string(all[len(all)-1].ID))
			return found
		})
		if !errors.Is(err, found) {
			s.Fatalf("no event: %v", err)
		}
	case "pause":
		a.Host.Pause(p.t, p.uuids[arg(0)])
	case "fail-disk":
		a.Host.FailDisk(p.t, p.uuids[arg(0)])
	case "off":
		a.Host.Stop(p.t, p.uuids[arg(0)], "shutdown")
	case "taken":
		p.world.Nodes[1].Host.PutGuest(arg(0))
	case "device":
		a.Host.PutDevice(p.t, p.uuids[arg(0)], arg(1))
	case "hold":
		a.Host.HoldCopies()
	case "release":
		a.Host.ReleaseCopies()
	case "copying":
		select {
		case <-p.copying:
		case <-ctx.Done():
			s.Fatalf("no copy has begun")
		}
	case "kill-libvirt":
		n := p.node(s, arg(0))
		n.Host.KillLibvirt()
		for {
			st, err := n.Client.Status(ctx)
			s.Check(err)
			if len(st.Conditions) > 0 && st.Conditions[0].Code == maint.CodeHypervisorDown {
				break
			}
		}
	case "stop":
		p.node(s, arg(0)).Stop()
	case "op":
		ops, err := a.Client.Ops(ctx)
		s.Check(err)
		if len(ops) == 0 {
			s.Fatalf("there is no operation")
		}
		s.Setenv("OP", string(ops[len(ops)-1].ID))
	case "seen-to": // the new host has told of the last operation's guest
		for {
			ops, err := a.Client.Ops(ctx)
			s.Check(err)
			if len(ops) > 0 && ops[len(ops)-1].Arrival != nil {
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
	case "drain-op", "apply-op":
		ops, err := a.Client.Ops(ctx)
		s.Check(err)
		for _, op := range ops {
			if string(op.Kind)+"-op" == verb {
				s.Setenv("OP", string(op.ID))
			}
		}
	case "qemu-patch":
		const build = "0123456789abcdef0123456789abcdef01234567"
		a.QEMUs.Run("web-1", build)
		a.QEMUs.Run("web-2")
		s.Setenv("PATCH", livetest.WriteContainer(p.t, s.MkAbs("livepatches"), arg(0), p.trusted(a).Container(arg(0), build)))
	case "patch":
		made := p.trusted(a).Make(arg(0), a.Kernel.Release, a.Kernel.Version, func(m *livetest.Spec) { m.Covers = []string{"CVE-2024-1086"} })
		s.Setenv("PATCH", livetest.Write(p.t, s.MkAbs("livepatches"), arg(0), made))
	case "pending":
		text := s.ReadFile(arg(0))
		a.Stop()
		a.Pending = pending.Host{Root: s.MkAbs("root"), Simulate: func(context.Context) ([]byte, error) { return []byte(text), nil }}
		a.Start(nil)
	case "crowd":
		n, err := strconv.Atoi(arg(0))
		s.Check(err)
		for i := range n {
			a.Host.PutGuest(fmt.Sprintf("guest-%04d", i), func(g *maint.Guest) { g.Policy = `refuse = ["D"]` })
		}
		for st := (maint.Status{}); st.Guests[maint.GuestRunning] < n; {
			st, err = a.Client.Status(ctx)
			s.Check(err)
		}
	case "large":
		s.Check(os.WriteFile(s.MkAbs(arg(0)), nil, 0o600))
		s.Check(os.Truncate(s.MkAbs(arg(0)), maint.MaxPlan+1))
	case "cut":
		info, err := os.Stat(arg(0))
		s.Check(err)
		s.Check(os.Truncate(arg(0), info.Size()/2))
	case "straggler":
		a.Stop()
		a.Timing.Limit = 300 * time.Millisecond
		a.Kernel.Hold(120, "worker_thread")
		a.Start(nil)
	case "runs":
		for _, n := range p.world.Nodes {
			g, err := n.Host.Guest(ctx, p.uuids[arg(0)])
			if runs := err == nil && g.State == maint.GuestRunning; runs != (n.Host.Name() == arg(1)) {
				s.Fatalf("%s on %s: %q, %v", arg(0), n.Host.Name(), g.State, err)
			}
		}
	default:
		s.Fatalf("unknown: world %s", verb)
	}
}

func (p *stage) create(s *testscript.TestScript, options []string) {
	port := ""
	if len(options) > 0 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		s.Check(err)
		port = l.Addr().String()
		if options[0] == "port=open" {
			s.Defer(func() { l.Close() })
		} else {
			s.Check(l.Close())
		}
	}
	p.world = agenttest.New(p.t, slog.New(slog.DiscardHandler), func(c *config.Config) {
		for name, peer := range c.Peers {
			if port != "" {
				peer.LibvirtURI = "qemu+tcp://" + port + "/system"
				c.Peers[name] = peer
			}
		}
	}, "a", "b")
	a := p.world.Nodes[0]
	p.uuids = map[string]string{"web-1": a.Host.PutGuest("web-1", func(g *maint.Guest) { g.Autostart = true }), "web-2": a.Host.PutGuest("web-2")}
	p.copying = make(chan struct{}, 16)
	p.world.OnPhase(func(_ string, ph hypervisortest.Phase) {
		if ph == hypervisortest.PhaseCopying {
			p.copying <- struct{}{}
		}
	})
	s.Setenv("BELAY_SOCKET", a.Config.API.Socket)
	s.Setenv("SOCKET_B", p.world.Nodes[1].Config.API.Socket)
	// When a greeted its peer for the first time, that was not up yet.
	a.Stop()
	a.Start(nil)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		st, err := a.Client.Status(ctx)
		s.Check(err)
		if len(st.Conditions) == 0 && st.Peers[0].OK && len(st.Guests) > 0 {
			return
		}
	}
}

// code runs a command and wants an exit code.
func code(s *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		s.Fatalf("usage: code N command …")
	}
	want, err := strconv.Atoi(args[0])
	s.Check(err)
	got, err := exitOf(s.Exec(args[1], args[2:]...))
	s.Check(err)
	if got != want {
		s.Fatalf("exit code is %d, want %d", got, want)
	}
}

func exitOf(err error) (int, error) {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode(), nil
	}
	return 0, err
}

func jsonField(s *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		s.Fatalf("usage: json PATH WANT")
	}
	var v any
	s.Check(json.Unmarshal([]byte(s.ReadFile("stdout")), &v))
	for key := range strings.SplitSeq(args[0], ".") {
		switch at := v.(type) {
		case map[string]any:
			v = at[key]
		case []any:
			i, err := strconv.Atoi(key)
			if err != nil || i >= len(at) {
				s.Fatalf("%s: there is no %s in a list of %d", args[0], key, len(at))
			}
			v = at[i]
		default:
			s.Fatalf("%s: there is no %s in %v", args[0], key, at)
		}
	}
	if got := fmt.Sprint(v); !regexp.MustCompile("^(?:" + args[1] + ")$").MatchString(got) {
		s.Fatalf("%s is %s, want %s", args[0], got, args[1])
	}
}

// begin starts a command in the background.
func (p *stage) begin(s *testscript.TestScript, args []string) {
	path := ""
	for _, dir := range filepath.SplitList(s.Getenv("PATH")) {
		if f := filepath.Join(dir, args[0]); path == "" {
			if _, err := os.Stat(f); err == nil {
				path = f
			}
		}
	}
	c := exec.Command(path, args[1:]...)
	p.written = &lookup{grown: make(chan struct{})}
	c.Stdout, c.Stderr = p.written, p.written
	c.Env = append(os.Environ(), "BELAY_SOCKET="+s.Getenv("BELAY_SOCKET"))
	s.Check(c.Start())
	p.background = c
	s.Defer(func() {
		if c.ProcessState == nil {
			_ = c.Process.Kill()
			_ = c.Wait()
		}
	})
}

func (p *stage) says(s *testscript.TestScript, want string) {
	if !p.written.await(regexp.MustCompile(want), patience) {
		s.Fatalf("it does not say %s:\n%s", want, p.written)
	}
}

func (p *stage) ends(s *testscript.TestScript, args []string) {
	want, err := strconv.Atoi(args[0])
	s.Check(err)
	if len(args) > 1 && args[1] == "interrupt" {
		s.Check(p.background.Process.Signal(os.Interrupt))
	}
	kill := time.AfterFunc(patience, func() { _ = p.background.Process.Kill() })
	defer kill.Stop()
	got, err := exitOf(p.background.Wait())
	s.Check(err)
	if got != want {
		s.Fatalf("exit code is %d, want %d:\n%s", got, want, p.written)
	}
}

// lookup keeps what is written, for who waits for it.
type lookup struct {
	mu    sync.Mutex
	b     strings.Builder
	grown chan struct{} // closed and replaced at every write
}

func (l *lookup) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.grown)
	l.grown = make(chan struct{})
	return l.b.Write(b)
}

func (l *lookup) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *lookup) await(want *regexp.Regexp, d time.Duration) bool {
	deadline := time.After(d)
	for {
		l.mu.Lock()
		found, grown := want.MatchString(l.b.String()), l.grown
		l.mu.Unlock()
		if found {
			return true
		}
		select {
		case <-grown:
		case <-deadline:
			return false
		}
	}
}
