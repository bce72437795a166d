package measure

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"belay/agent/maint"
	"belay/vmtests/cluster"
	"belay/vmtests/guest"
	"belay/vmtests/lab"
	"belay/vmtests/observer"
	"belay/vmtests/probe"
)

// Flock is guests that are moved together, on hosts with a belayd each. They have 128
// MiB and no disk, and send heartbeats.
type Flock struct {
	Lab      *lab.Lab
	Cluster  *cluster.Cluster
	Observer *observer.Observer
	Guests   []*Member

	at int // index in Cluster.Nodes of the host where they were last sent
}

// Member is a guest of a flock.
type Member struct {
	*guest.Guest
	boot     string
	checksum uint64
}

// FlockConfig says what flock to make.
type FlockConfig struct {
	Lab    lab.Config // QEMU is the image's
	Bin    cluster.Binaries
	Guests int
	// Interval is the time between heartbeats of a guest, and Dirty what each
	// writes.
	Interval time.Duration
	Dirty    probe.DirtySettings
	// Edit, unless nil, changes what a guest is to be, which is web-1, web-2, ... without it.
	Edit func(*guest.Spec)
	// Stage, unless nil, is told what FlockUp begins to do.
	Stage func(text string)
}

// FlockUp makes one, on the first host. If it fails, nothing is left.
func FlockUp(ctx context.Context, c FlockConfig) (_ *Flock, err error) {
	if c.Edit == nil {
		c.Edit = func(*guest.Spec) {}
	}
	if c.Stage == nil {
		c.Stage = func(string) {}
	}
	img, accel, _, err := guest.Prepare(ctx, guest.DefaultCache(), slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	f := &Flock{Guests: make([]*Member, c.Guests)}
	defer func() {
		if err == nil {
			return
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, f.Down(ctx))
	}()
	c.Lab.QEMU = img.QEMU
	c.Stage("making the hosts, each with a libvirtd of its own")
	if f.Lab, err = lab.Up(ctx, c.Lab); err != nil {
		return nil, err
	}
	c.Stage("starting belayd on each")
	if f.Cluster, err = cluster.Up(ctx, f.Lab, c.Bin); err != nil {
		return nil, err
	}
	if f.Observer, err = observe(f.Lab, Heartbeats()); err != nil {
		return nil, err
	}
	c.Stage(fmt.Sprintf("booting %d guests on %s", c.Guests, f.At().Name))
	boot, bootCtx := errgroup.WithContext(ctx)
	boot.SetLimit(bootAtOnce)
	for i := range f.Guests {
		boot.Go(func() error {
			s := guest.Spec{Name: fmt.Sprintf("web-%d", i+1), Accel: accel, Cmdline: guest.SteadyClock, Heartbeat: Heartbeats(),
				IP: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, 1, byte(i + 1)}), 16), IntervalUs: int(c.Interval.Microseconds())}
			c.Edit(&s)
			g, err := guest.Start(bootCtx, f.At(), s, img)
			if err != nil {
				return err
			}
			f.Guests[i] = &Member{Guest: g}
			return f.Guests[i].meet(bootCtx, f.At(), c.Dirty)
		})
	}
	return f, boot.Wait()
}

// meet has a new guest begin to write, and learns what it is to be known by.
func (m *Member) meet(ctx context.Context, h guest.Host, d probe.DirtySettings) error {
	c, s, err := greet(ctx, m.Guest, h)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Dirty(ctx, d); err != nil {
		return err
	}
	r, err := c.Verify(ctx)
	m.boot, m.checksum = s.BootID, r.FixedChecksum
	return err
}

// Down removes all of it.
func (f *Flock) Down(ctx context.Context) error {
	var errs []error
	if f.Cluster != nil {
		errs = append(errs, f.Cluster.Down())
	}
	if f.Observer != nil {
		errs = append(errs, f.Observer.Close())
	}
	if f.Lab != nil {
		errs = append(errs, f.Lab.Down(ctx))
	}
	return errors.Join(errs...)
}

// At is the host where the guests were last sent, and Other the next.
func (f *Flock) At() *cluster.Node { return f.Cluster.Nodes[f.at] }

// Other is the second host if the guests are on the first, and the first otherwise.
func (f *Flock) Other() *cluster.Node {
	if f.at == 0 {
		return f.Cluster.Nodes[1]
	}
	return f.Cluster.Nodes[0]
}

// Evacuation is what was measured of moving all guests of a host.
type Evacuation struct {
	Tool    string
	Total   time.Duration   // the command, from its start to its exit
	Outages []time.Duration // the longest silence of each guest on the LAN
	Op      *maint.Op       // Belay's own account
}

// Outage is the sum of the guests' outages.
func (e Evacuation) Outage() (sum time.Duration) {
	for _, o := range e.Outages {
		sum += o
	}
	return sum
}

// Belay moves them to the other host by belay drain, with flags of its own.
func (f *Flock) Belay(ctx context.Context, flags ...string) (Evacuation, error) {
	if r, err := f.Other().Belay(ctx, "uncordon"); err != nil || r.Code != 0 {
		return Evacuation{}, fmt.Errorf("cannot uncordon %s: %w: %s", f.Other().Name, err, r.Stderr)
	}
	return f.evacuate(ctx, Belay, func(e *Evacuation) error {
		e.Op = new(maint.Op)
		args := append([]string{"drain", "--to", f.Other().Name}, flags...)
		if err := f.At().BelayJSON(ctx, e.Op, args...); err != nil {
			return err
		}
		if e.Op.Outcome != maint.OutcomeDone {
			return fmt.Errorf("operation %s: %s", e.Op.ID, e.Op.Outcome)
		}
		return nil
	})
}

// drainLoop is how one empties a host without Belay.
const drainLoop = `set -e; to=$1; shift
for g in "$@"; do virsh -q -c "$URI" migrate --live --p2p --persistent --undefinesource "$g" "$to"; done`

// Virsh moves them by virsh in a loop of the shell.
func (f *Flock) Virsh(ctx context.Context) (Evacuation, error) {
	return f.evacuate(ctx, Virsh, func(*Evacuation) error {
		args := []string{"-c", drainLoop, "sh", f.Other().PeerURI(f.Lab.TLS)}
		for _, m := range f.Guests {
			args = append(args, m.Spec.Name)
		}
		cmd := exec.CommandContext(ctx, "sh", args...)
		cmd.Env = append(cmd.Environ(), "URI="+f.At().URI())
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

// evacuate lets do move all guests, and looks on.
func (f *Flock) evacuate(ctx context.Context, tool string, do func(*Evacuation) error) (Evacuation, error) {
	e := Evacuation{Tool: tool}
	if err := pause(ctx, 2*rest); err != nil {
		return e, err
	}
	begin := time.Now()
	reports, err := f.Feel(ctx, func() error {
		err := do(&e)
		e.Total = time.Since(begin)
		return err
	})
	if err != nil {
		return e, fmt.Errorf("cannot empty %s by %s: %w", f.At().Name, tool, err)
	}
	f.Sent(f.Other())
	for _, r := range reports {
		e.Outages = append(e.Outages, r.Pause())
	}
	return e, nil
}

// Feel lets do change something, waits until every guest is heard, and reports what the
// LAN has seen of each meanwhile, in their order.
func (f *Flock) Feel(ctx context.Context, do func() error) (reports []observer.Report, err error) {
	mark := f.Observer.Mark()
	if err := do(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	for _, m := range f.Guests {
		if err := f.Observer.Await(ctx, m.Spec.Name, wardSettled); err != nil {
			return nil, err
		}
		r := f.Observer.Since(mark, m.Spec.Name)
		if r.Restarts != 0 || r.Truncated {
			return nil, fmt.Errorf("guest %s was restarted on the way, or not seen all the time: %+v", m.Spec.Name, r)
		}
		reports = append(reports, r)
	}
	return reports, nil
}

// Sent books that the guests have gone to a host.
func (f *Flock) Sent(to *cluster.Node) { f.at = slices.Index(f.Cluster.Nodes, to) }

// Prove returns an error unless every guest is whole, and runs and is defined on the
// host where at says it is, by name, and nowhere else; nil is all where they were sent.
func (f *Flock) Prove(ctx context.Context, at map[string]string) error {
	for _, m := range f.Guests {
		name := cmp.Or(at[m.Spec.Name], f.At().Name)
		for _, n := range f.Cluster.Nodes {
			for _, what := range [][]string{{"list", "--name"}, {"list", "--all", "--persistent", "--name"}} {
				out, err := n.Virsh(ctx, what...)
				if err != nil {
					return err
				}
				if is := slices.Contains(strings.Fields(out), m.Spec.Name); is != (n.Name == name) {
					return fmt.Errorf("guest %s should be on %s; %s of %s has it: %t", m.Spec.Name, name, strings.Join(what, " "), n.Name, is)
				}
			}
			if n.Name == name {
				if err := m.prove(ctx, n); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func (m *Member) prove(ctx context.Context, h guest.Host) error {
	c, s, err := greet(ctx, m.Guest, h)
	if err != nil {
		return fmt.Errorf("guest %s: %w", m.Spec.Name, err)
	}
	defer c.Close()
	r, err := c.Verify(ctx)
	switch {
	case err != nil:
		return fmt.Errorf("guest %s: %w", m.Spec.Name, err)
	case s.BootID != m.boot:
		return fmt.Errorf("guest %s has rebooted", m.Spec.Name)
	case !r.OK() || r.FixedChecksum != m.checksum:
		return fmt.Errorf("memory of guest %s is damaged: %+v", m.Spec.Name, r)
	}
	return nil
}
