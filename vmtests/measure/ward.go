package measure

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"belay/vmtests/cluster"
	"belay/vmtests/guest"
	"belay/vmtests/lab"
	"belay/vmtests/observer"
)

// Ward is one host with its belayd, whose guests are held. Each guest has a
// disk, and with it a lease that a pause gives up, an agent, and a heartbeat.
type Ward struct {
	Node     *cluster.Node
	Observer *observer.Observer

	lab     *lab.Lab
	cluster *cluster.Cluster
	events  *qemuEvents
	guests  []*patient
}

// patient is a guest of a ward.
type patient struct {
	name  string
	probe *guest.Control
	boot  string // ID of its kernel
}

const (
	// wardInterval is the time between heartbeats: with less, twenty emulated
	// guests would keep two cores busy with nothing else.
	wardInterval = 100 * time.Millisecond
	// bootAtOnce is how many guests boot side by side.
	bootAtOnce = 2
)

// WardUp makes a ward of n guests with 128 MiB each. If it fails, nothing is
// left.
func WardUp(ctx context.Context, bin cluster.Binaries, name string, n int) (_ *Ward, err error) {
	img, accel, _, err := guest.Prepare(ctx, guest.DefaultCache(), slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	w := &Ward{guests: make([]*patient, n)}
	defer func() {
		if err == nil {
			return
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, w.Down(ctx))
	}()
	if w.lab, err = lab.Up(ctx, lab.Config{Name: name, Hosts: 1, QEMU: img.QEMU}); err != nil {
		return nil, err
	}
	if w.cluster, err = cluster.Up(ctx, w.lab, bin); err != nil {
		return nil, err
	}
	w.Node = w.cluster.Nodes[0]
	if w.Observer, err = observe(w.lab, Heartbeats()); err != nil {
		return nil, err
	}
	if w.events, err = listenQEMU(w.Node); err != nil {
		return nil, err
	}
	boot, bootCtx := errgroup.WithContext(ctx)
	boot.SetLimit(bootAtOnce)
	for i := range n {
		boot.Go(func() (err error) {
			w.guests[i], err = w.admit(bootCtx, i+1, guest.Spec{Accel: accel}, img)
			return err
		})
	}
	if err := boot.Wait(); err != nil {
		return nil, err
	}
	if err := w.try(ctx); err != nil {
		return nil, err
	}
	// A kernel boots by an RTC of whole seconds.
	return w, w.Sync(ctx)
}

// admit starts the i-th guest.
func (w *Ward) admit(ctx context.Context, i int, s guest.Spec, img guest.Image) (*patient, error) {
	s.Name = fmt.Sprintf("web-%d", i)
	s.IP = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, 1, byte(i)}), 16)
	s.Heartbeat, s.IntervalUs = Heartbeats(), int(wardInterval.Microseconds())
	// On a busy machine a guest can take its TSC for several times slower than
	// it is. This clock needs no calibration: it is QEMU's.
	s.Cmdline = "clocksource=acpi_pm"
	s.Disk = filepath.Join(w.lab.Shared, s.Name+".qcow2")
	if err := guest.CreateDisk(ctx, s.Disk, 16); err != nil {
		return nil, err
	}
	g, err := guest.Start(ctx, w.Node, s, img)
	if err != nil {
		return nil, err
	}
	c, status, err := greet(ctx, g, w.Node)
	if err != nil {
		return nil, err
	}
	return &patient{name: s.Name, probe: c, boot: status.BootID}, nil
}

// try pauses a guest until the ruler of QEMU's events has seen it.
func (w *Ward) try(ctx context.Context) error {
	const once = time.Second
	for {
		begin := time.Now()
		for _, verb := range []string{"suspend", "resume"} {
			if _, err := w.Node.Virsh(ctx, verb, w.guests[0].name); err != nil {
				return err
			}
		}
		one, cancel := context.WithTimeout(ctx, once)
		_, err := w.events.since(one, begin, 1)
		cancel()
		if err == nil || one.Err() == nil || ctx.Err() != nil {
			return err
		}
	}
}

// Down removes all of it.
func (w *Ward) Down(ctx context.Context) error {
	for _, p := range w.guests {
		if p != nil {
			_ = p.probe.Close() // the guest goes with the lab
		}
	}
	if w.events != nil {
		w.events.close()
	}
	var errs []error
	if w.cluster != nil {
		errs = append(errs, w.cluster.Down())
	}
	if w.Observer != nil {
		errs = append(errs, w.Observer.Close())
	}
	if w.lab != nil {
		errs = append(errs, w.lab.Down(ctx))
	}
	return errors.Join(errs...)
}

// Prove returns an error unless every guest runs, is the one that was started,
// and has all its memory.
func (w *Ward) Prove(ctx context.Context) error {
	for _, p := range w.guests {
		s, err := p.probe.Status(ctx)
		if err != nil {
			return fmt.Errorf("guest %s: %w", p.name, err)
		}
		if s.BootID != p.boot {
			return fmt.Errorf("guest %s has rebooted", p.name)
		}
		if m, err := p.probe.Verify(ctx); err != nil || !m.OK() {
			return fmt.Errorf("memory of guest %s is damaged: %+v, %w", p.name, m, err)
		}
	}
	return nil
}
