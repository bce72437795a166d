// Package cluster runs the real belayd on every host of a lab, and drives it
// with the real belay, as the hosts' operator would.
//
//	lab host-a: libvirtd + belayd ◄── mutual TLS over the lab's LAN ──► host-b: …
//	     ▲
//	     └── belay, over the unix socket
package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"belay/agent/api"
	"belay/agent/maint"
	"belay/vmtests/lab"
)

// port is where belayd listens on the lab's LAN.
const port = "7443"

// Binaries are the built programs. belay-leash is beside them.
type Binaries struct{ Belay, Belayd string }

// Build builds the programs into dir.
func Build(ctx context.Context, dir string) (Binaries, error) {
	b := Binaries{filepath.Join(dir, "belay"), filepath.Join(dir, "belayd")}
	root, err := moduleRoot(ctx)
	if err != nil {
		return b, err
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-o", dir+string(filepath.Separator), "./cmd/...")
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		return b, fmt.Errorf("cannot build Belay's programs: %w\n%s", err, out)
	}
	return b, nil
}

// Programs are those in $BELAY_BIN, or else are built into a temporary folder,
// which discard removes.
func Programs(ctx context.Context) (bin Binaries, discard func() error, err error) {
	if dir := os.Getenv("BELAY_BIN"); dir != "" {
		if dir, err = filepath.Abs(dir); err != nil {
			return bin, nil, err
		}
		bin = Binaries{Belay: filepath.Join(dir, "belay"), Belayd: filepath.Join(dir, "belayd")}
		for _, program := range []string{bin.Belay, bin.Belayd} {
			if _, err := os.Stat(program); err != nil {
				return bin, nil, fmt.Errorf("BELAY_BIN: %w", err)
			}
		}
		return bin, func() error { return nil }, nil
	}
	dir, err := os.MkdirTemp("", "belay-bin-")
	if err != nil {
		return bin, nil, err
	}
	discard = func() error { return os.RemoveAll(dir) }
	if bin, err = Build(ctx, dir); err != nil {
		return bin, nil, errors.Join(err, discard())
	}
	return bin, discard, nil
}

func moduleRoot(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("cannot find the module: %w", err)
	}
	return filepath.Dir(strings.TrimSpace(string(out))), nil
}

// Cluster is a lab whose hosts run belayd.
type Cluster struct {
	Lab   *lab.Lab
	Nodes []*Node
}

// Node is one host with its belayd.
type Node struct {
	*lab.Host
	// Settings are further lines of configuration, PeerSettings those of each peer; set
	// before Start. ByAddress has peers' libvirt be called by address.
	Settings, PeerSettings string
	ByAddress              bool

	lab *lab.Lab
	bin Binaries

	mu   sync.Mutex
	cmd  *exec.Cmd
	done chan struct{} // closed when belayd has ended
}

// Up starts belayd on every host of l and waits until each greets its peers.
func Up(ctx context.Context, l *lab.Lab, bin Binaries) (*Cluster, error) {
	c := &Cluster{Lab: l}
	for _, h := range l.Hosts {
		n := &Node{Host: h, lab: l, bin: bin}
		if err := n.Start(ctx); err != nil {
			return nil, errors.Join(err, c.Down())
		}
		c.Nodes = append(c.Nodes, n)
	}
	for _, n := range c.Nodes {
		if err := n.awaitPeers(ctx); err != nil {
			return nil, errors.Join(err, c.Down())
		}
	}
	return c, nil
}

// Down stops every belayd. The lab stays.
func (c *Cluster) Down() error {
	var errs []error
	for _, n := range c.Nodes {
		errs = append(errs, n.Stop())
	}
	return errors.Join(errs...)
}

// Socket is belayd's unix socket; the lab's folder has the same path inside
// the host and outside.
func (n *Node) Socket() string { return filepath.Join(n.Dir, "belayd.sock") }

// Client speaks to the node's belayd as root.
func (n *Node) Client() *api.Client { return api.NewUnix(n.Socket()) }

// Belayd is its program; belay, belay-leash and belay-guest are beside it.
func (n *Node) Belayd() string { return n.bin.Belayd }

// ConfigFile is belayd's configuration.
func (n *Node) ConfigFile() string { return filepath.Join(n.Dir, "belayd.toml") }

// StateDir holds belayd's journal.
func (n *Node) StateDir() string { return filepath.Join(n.Dir, "state") }

// LogFile is what belayd has said in all of its lives; it is where
// lab.CollectLogs finds it.
func (n *Node) LogFile() string { return n.Path("/var/log/libvirt/belayd.log") }

func (n *Node) config() string {
	var b strings.Builder
	fmt.Fprintf(&b, "host = %q\nstate_dir = %q\n", n.Name, n.StateDir())
	fmt.Fprint(&b, n.Settings)
	fmt.Fprintf(&b, "\n[api]\nsocket = %q\nlisten = \"%s:%s\"\n", n.Socket(), n.Addr, port)
	fmt.Fprintf(&b, "[tls]\nca = %q\ncert = %q\nkey = %q\n", n.lab.CAFile(), n.CertFile(), n.KeyFile())
	for _, h := range n.lab.Hosts {
		if h.Name != n.Name {
			uri := h.PeerURI(n.lab.TLS)
			if n.ByAddress {
				uri = strings.Replace(uri, h.Name, h.Addr.String(), 1)
			}
			fmt.Fprintf(&b, "[peers.%s]\naddress = \"%s:%s\"\nlibvirt_uri = %q\n%s\n", h.Name, h.Addr, port, uri, n.PeerSettings)
		}
	}
	return b.String()
}

// Start writes the configuration, starts belayd and waits until it answers.
func (n *Node) Start(ctx context.Context) error {
	if err := os.WriteFile(n.ConfigFile(), []byte(n.config()), 0o600); err != nil {
		return err
	}
	log, err := os.OpenFile(n.LogFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	// belayd outlives ctx: it is stopped by Stop or Kill, or with the lab.
	cmd := n.Command(context.WithoutCancel(ctx), n.bin.Belayd, "-config", n.ConfigFile())
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("cannot start belayd on %s: %w", n.Name, err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = cmd.Wait() // how it ended is seen in its log
	}()
	n.mu.Lock()
	n.cmd, n.done = cmd, done
	n.mu.Unlock()
	return n.await(ctx, "belayd answers", func() error {
		select {
		case <-done:
			return &gone{n.logTail()}
		default:
		}
		_, err := n.Client().Status(ctx)
		return err
	})
}

// gone says that belayd has ended when it should not have.
type gone struct{ log string }

func (g *gone) Error() string { return "belayd has ended:\n" + g.log }

func (n *Node) logTail() string {
	b, err := os.ReadFile(n.LogFile())
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-2000):])
}

func (n *Node) awaitPeers(ctx context.Context) error {
	return n.await(ctx, "belayd has met its peers", func() error {
		checks, err := n.Client().Doctor(ctx)
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

// await asks until f is content.
func (n *Node) await(ctx context.Context, what string, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		err := f()
		var g *gone
		if err == nil || errors.As(err, &g) {
			return err
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("waiting until %s on %s: %w\n%s", what, n.Name, err, n.logTail())
		}
	}
}

// PID is belayd's process ID, 0 when it does not run.
func (n *Node) PID() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cmd == nil {
		return 0
	}
	return n.cmd.Process.Pid
}

// Kill ends belayd with SIGKILL.
func (n *Node) Kill() error { return n.end(syscall.SIGKILL) }

// Stop ends belayd in order.
func (n *Node) Stop() error { return n.end(syscall.SIGTERM) }

func (n *Node) end(sig syscall.Signal) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cmd == nil {
		return nil
	}
	if err := n.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-n.done:
	case <-time.After(time.Minute):
		return fmt.Errorf("belayd on %s does not end on %s", n.Name, sig)
	}
	n.cmd = nil
	return nil
}

// Result is how a run of belay ended.
type Result struct {
	Code           int
	Stdout, Stderr string
}

// Belay runs the operator's CLI against this node.
func (n *Node) Belay(ctx context.Context, args ...string) (Result, error) {
	cmd := exec.CommandContext(ctx, n.bin.Belay, append([]string{"--socket", n.Socket()}, args...)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	r := Result{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return r, fmt.Errorf("cannot run belay: %w", err)
	}
	return r, nil
}

// BelayJSON runs belay with -o json and decodes what it prints; a code other
// than 0 is an error.
func (n *Node) BelayJSON(ctx context.Context, v any, args ...string) error {
	r, err := n.Belay(ctx, append([]string{"-o", "json"}, args...)...)
	if err != nil {
		return err
	}
	if r.Code != 0 {
		return fmt.Errorf("belay %s on %s ended with %d:\n%s", strings.Join(args, " "), n.Name, r.Code, r.Stderr)
	}
	return json.Unmarshal([]byte(r.Stdout), v)
}

// arrivalPoll is how often a record is looked at that nothing announces.
const arrivalPoll = 100 * time.Millisecond

// AwaitArrival waits until the operation, which has moved a guest away from the node,
// has what the guest's new host did for it.
func (n *Node) AwaitArrival(ctx context.Context, op *maint.Op) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		if err := n.BelayJSON(ctx, op, "ops", "show", string(op.ID)); err != nil || op.Arrival != nil {
			return err
		}
		select {
		case <-time.After(arrivalPoll):
		case <-ctx.Done():
			return fmt.Errorf("%s has not told what was done for guest %s where it went: %w", n.Name, op.Guest, ctx.Err())
		}
	}
}
