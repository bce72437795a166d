package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"
)

// Host is where a guest runs. Packages lab and machine have one each.
type Host interface {
	// Virsh runs virsh for the host and returns its standard output; the
	// error holds what it said on standard error. Files among the arguments
	// are this machine's.
	Virsh(ctx context.Context, args ...string) (string, error)
	// DialUnix connects to a unix socket, ReadFile reads a file, by the path
	// that it has inside the host.
	DialUnix(ctx context.Context, inside string) (net.Conn, error)
	ReadFile(ctx context.Context, inside string) ([]byte, error)
}

// Guest is a guest that was started. It may have moved since, so its methods
// take the host where it is now.
type Guest struct {
	Spec  Spec // with defaults filled in
	Image Image
	Boot  Boot
}

// Boot is how long a guest took to come up, from the call of Start.
type Boot struct {
	Probe time.Duration // until the probe answered
	Agent time.Duration // until the guest agent answered too
}

// agentRetry is the time between two tries to reach the guest agent; libvirt
// has an event for it, but virsh costs more than it saves.
const agentRetry = 100 * time.Millisecond

// Start defines (or, if transient, creates) and starts a guest, and waits
// until its probe and its agent answer. Without a deadline in ctx it gives up
// after two minutes. On an error nothing of the guest is left on the host, and
// the error holds the end of its console.
func Start(ctx context.Context, h Host, s Spec, img Image) (*Guest, error) {
	s, err := s.withDefaults()
	if err != nil {
		return nil, err
	}
	g := &Guest{Spec: s, Image: img}
	if err := g.start(ctx, h); err != nil {
		ctx := context.WithoutCancel(ctx) // it may be what failed
		console := g.consoleTail(ctx, h)
		err = errors.Join(err, g.Destroy(ctx, h))
		return nil, fmt.Errorf("cannot start guest %s: %w%s", s.Name, err, console)
	}
	return g, nil
}

func (g *Guest) start(ctx context.Context, h Host) error {
	if _, bounded := ctx.Deadline(); !bounded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, callTimeout)
		defer cancel()
	}
	begin := time.Now()
	if err := g.launch(ctx, h); err != nil {
		return err
	}
	c, err := Dial(ctx, h, g.Spec.Name)
	if err != nil {
		return err
	}
	defer c.Close()
	// The question waits in the channel until the guest opens it.
	if _, err := c.Status(ctx); err != nil {
		return err
	}
	g.Boot.Probe = time.Since(begin)
	for {
		err := g.AgentPing(ctx, h)
		if err == nil {
			g.Boot.Agent = time.Since(begin)
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("guest agent does not answer: %w", err)
		case <-time.After(agentRetry):
		}
	}
}

// launch gives libvirt the guest's XML.
func (g *Guest) launch(ctx context.Context, h Host) error {
	xml, err := g.Spec.XML(g.Image)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp("", "belay-guest-*.xml")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString(xml)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if g.Spec.Transient {
		_, err := h.Virsh(ctx, "create", f.Name())
		return err
	}
	if _, err := h.Virsh(ctx, "define", f.Name()); err != nil {
		return err
	}
	_, err = h.Virsh(ctx, "start", g.Spec.Name)
	return err
}

// AgentPing asks the guest agent for a sign of life, for at most five seconds.
func (g *Guest) AgentPing(ctx context.Context, h Host) error {
	_, err := h.Virsh(ctx, "qemu-agent-command", "--timeout", "5", g.Spec.Name, `{"execute":"guest-ping"}`)
	return err
}

// Dial connects to the guest's probe.
func (g *Guest) Dial(ctx context.Context, h Host) (*Control, error) { return Dial(ctx, h, g.Spec.Name) }

// Console is what the guest has printed on this host so far.
func (g *Guest) Console(ctx context.Context, h Host) (string, error) {
	b, err := h.ReadFile(ctx, ConsolePath(g.Spec.Name))
	return string(b), err
}

func (g *Guest) consoleTail(ctx context.Context, h Host) string {
	text, err := g.Console(ctx, h)
	if err != nil || text == "" {
		return "; its console is empty"
	}
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return "; its console ends:\n" + strings.Join(lines[max(0, len(lines)-15):], "\n")
}

// Destroy removes the guest from a host, running or not. That it is not there
// is no error.
func (g *Guest) Destroy(ctx context.Context, h Host) error {
	running, err := h.Virsh(ctx, "list", "--name")
	if err != nil {
		return err
	}
	if has(running, g.Spec.Name) {
		if _, err := h.Virsh(ctx, "destroy", g.Spec.Name); err != nil {
			return err
		}
	}
	persistent, err := h.Virsh(ctx, "list", "--all", "--persistent", "--name")
	if err != nil {
		return err
	}
	if has(persistent, g.Spec.Name) {
		// A managed save image would otherwise be in the way.
		_, err = h.Virsh(ctx, "undefine", "--managed-save", g.Spec.Name)
	}
	return err
}

func has(list, name string) bool {
	for line := range strings.Lines(list) {
		if strings.TrimSpace(line) == name {
			return true
		}
	}
	return false
}
