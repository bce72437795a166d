package measure

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"belay/agent/maint"
	"belay/vmtests/cluster"
	"belay/vmtests/guest"
	"belay/vmtests/lab"
	"belay/vmtests/observer"
	"belay/vmtests/probe"
)

// Heartbeats is where a bed's guest sends its heartbeats.
func Heartbeats() netip.AddrPort { return netip.AddrPortFrom(lab.SwitchAddr(), 9099) }

// Config says what bed to make.
type Config struct {
	// Lab is the lab to bring up. QEMU may be left empty: it is the image's.
	Lab lab.Config
	// Spec is the guest. Name, MemoryMiB, IP, Accel and Heartbeat, when zero,
	// become web-1, 192, 10.77.1.1/16, what Prepare found and Heartbeats().
	Spec guest.Spec
	// Image and its accelerator, as guest.Prepare returned them. A zero Image
	// has Up call it, with the default cache.
	Image guest.Image

	DirtyMiBs     float64 // how much the guest writes, MiB/s
	WorkingSetMiB int     // to how much memory; 0 leaves what the guest has

	Bin cluster.Binaries // see cluster.Programs
	Log *slog.Logger     // nil discards
}

func (c *Config) complete() {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Lab.Log == nil {
		c.Lab.Log = c.Log
	}
	s := &c.Spec
	if s.Name == "" {
		s.Name = "web-1"
	}
	if s.MemoryMiB == 0 {
		s.MemoryMiB = 192
	}
	if !s.IP.IsValid() {
		s.IP = netip.MustParsePrefix("10.77.1.1/16")
	}
	if !s.Heartbeat.IsValid() {
		s.Heartbeat = Heartbeats()
	}
}

// Bed is a cluster with one guest, and an observer of it. Its methods are not
// to be called side by side.
type Bed struct {
	Cluster  *cluster.Cluster
	Lab      *lab.Lab
	Guest    *guest.Guest
	Observer *observer.Observer
	Bin      cluster.Binaries
	// BandwidthMiBs limits the moves by either tool; 0 is no limit.
	BandwidthMiBs uint64
	// Allow is what Belay may do for a guest that writes too fast.
	Allow []maint.Means

	at    int // index in Cluster.Nodes of the host where the guest is
	first identity
}

// Up makes a bed: the guest runs on the first host and dirties memory when it
// returns. If it fails, or ctx ends, nothing is left.
func Up(ctx context.Context, c Config) (_ *Bed, err error) {
	c.complete()
	if c.Image.Kernel == "" {
		img, accel, reason, err := guest.Prepare(ctx, guest.DefaultCache(), c.Log)
		if err != nil {
			return nil, err
		}
		c.Log.Info("accelerator", "accel", accel, "reason", reason)
		c.Image = img
		if c.Spec.Accel == "" {
			c.Spec.Accel = accel
		}
	}
	if c.Lab.QEMU == "" {
		c.Lab.QEMU = c.Image.QEMU
	}

	b := &Bed{Bin: c.Bin}
	defer func() {
		if err == nil {
			return
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, b.Down(ctx))
	}()
	if b.Lab, err = lab.Up(ctx, c.Lab); err != nil {
		return nil, err
	}
	if b.Cluster, err = cluster.Up(ctx, b.Lab, c.Bin); err != nil {
		return nil, err
	}
	if b.Observer, err = observe(b.Lab, c.Spec.Heartbeat); err != nil {
		return nil, err
	}
	if b.Guest, err = guest.Start(ctx, b.At(), c.Spec, c.Image); err != nil {
		return nil, err
	}
	if err := b.Dirty(ctx, c.DirtyMiBs, c.WorkingSetMiB); err != nil {
		return nil, err
	}
	if b.first, err = b.look(ctx); err != nil {
		return nil, err
	}
	return b, b.Observer.Await(ctx, b.name(), settled)
}

// observe listens for heartbeats on the lab's LAN.
func observe(l *lab.Lab, at netip.AddrPort) (o *observer.Observer, err error) {
	err = l.InSwitch(func() error {
		conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(at))
		if err != nil {
			return err
		}
		if o, err = observer.Listen(conn, observer.Options{}); err != nil {
			return errors.Join(err, conn.Close())
		}
		return nil
	})
	return o, err
}

// Down removes all of it. It may be called again after it failed.
func (b *Bed) Down(ctx context.Context) error {
	var errs []error
	if b.Cluster != nil {
		errs = append(errs, b.Cluster.Down())
	}
	if b.Observer != nil {
		errs = append(errs, b.Observer.Close())
		b.Observer = nil
	}
	if b.Lab != nil {
		errs = append(errs, b.Lab.Down(ctx))
	}
	return errors.Join(errs...)
}

// At is the host where the guest is.
func (b *Bed) At() *cluster.Node { return b.Cluster.Nodes[b.at] }

// Other is the host where the guest goes next.
func (b *Bed) Other() *cluster.Node { return b.Cluster.Nodes[1-b.at] }

func (b *Bed) name() string { return b.Guest.Spec.Name }

// Dirty has the guest write rate MiB/s to a working set of that many MiB; 0
// MiB keeps the present one. A new working set starts afresh.
func (b *Bed) Dirty(ctx context.Context, rate float64, workingSetMiB int) error {
	c, _, err := b.dial(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Dirty(ctx, probe.DirtySettings{RateMiBs: rate, WorkingSetMiB: workingSetMiB})
	return err
}

const (
	// greetTimeout is how long the probe may take to answer a greeting.
	greetTimeout = 5 * time.Second
	greetings    = 5
)

// dial connects to the guest's probe and returns its first answer.
func (b *Bed) dial(ctx context.Context) (*guest.Control, probe.Status, error) {
	return greet(ctx, b.Guest, b.At())
}

// greet connects to a guest's probe and returns its first answer. That one can
// get lost: a guest that has the question before it knows that a new client is
// there drops the answer, as there is nobody to take it. So it is asked again.
func greet(ctx context.Context, g *guest.Guest, h guest.Host) (c *guest.Control, s probe.Status, err error) {
	if c, err = g.Dial(ctx, h); err != nil {
		return nil, s, err
	}
	for range greetings {
		once, cancel := context.WithTimeout(ctx, greetTimeout)
		s, err = c.Status(once)
		cancel()
		if err == nil || ctx.Err() != nil {
			break
		}
	}
	if err != nil {
		c.Close()
		return nil, s, err
	}
	return c, s, nil
}
