package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"belay/agent/maint"
	"belay/vmtests/cluster"
	"belay/vmtests/guest"
	"belay/vmtests/measure"
	"belay/vmtests/observer"
	"belay/vmtests/updates"
)

// eventsOn has belayd tell guests.
const eventsOn = "[events]\nenabled = true\n"

// leaveLoop is how one empties a host without Belay.
const leaveLoop = `
m="virsh migrate --live --p2p --persistent --undefinesource"
for g in GUESTS; do $m $g %s; done`

// leave has host-a leave service, and come back: by Belay, and then by virsh.
func (d *demo) leave(ctx context.Context) error {
	a, b := d.flock.At(), d.flock.Other()
	if err := d.tellGuests(ctx); err != nil {
		return err
	}
	if err := d.mayNotMove(ctx, a); err != nil {
		return err
	}
	p, err := d.plan(ctx, a, updates.Retire)
	if err != nil {
		return err
	}
	var op maint.OpID
	away, err := d.feel(ctx, func() (err error) {
		if op, err = d.retire(ctx, a); err != nil {
			return err
		}
		return d.arrived(ctx, a, op, a)
	})
	if err != nil {
		return err
	}
	if err := d.felt(ctx, a, op, away); err != nil {
		return err
	}
	d.flock.Sent(b)
	if err := d.flock.Prove(ctx, nil); err != nil {
		return err
	}
	d.line("  All run on %s, whole, and are defined nowhere else.", b.Name)

	d.line("")
	d.line("  %s is back in service, and so are its guests, which are told and approve again:", a.Name)
	back, err := d.feel(ctx, func() (err error) {
		if op, err = d.restore(ctx, a, b); err != nil {
			return err
		}
		return d.arrived(ctx, a, op, b)
	})
	if err != nil {
		return err
	}
	if err := d.felt(ctx, a, op, back); err != nil {
		return err
	}
	d.flock.Sent(a)
	if err := d.flock.Prove(ctx, nil); err != nil {
		return err
	}

	d.line("")
	d.line("  The same by plain scripts, there and back:")
	plainAway, err := d.virsh(ctx, a, b)
	if err != nil {
		return err
	}
	plainBack, err := d.virsh(ctx, b, a)
	if err != nil {
		return err
	}
	d.line("  Nobody was asked: %s has moved, although its policy is that its owner decides when.", asksFirst)
	d.rows = append(d.rows,
		row{what: "host-a leaves", rung: "D, C", belay: away, predicted: predicted(p), script: plainAway},
		row{what: "host-a is back", rung: "D", belay: back, script: plainBack})
	return nil
}

// tellGuests has both hosts tell their guests from now on.
func (d *demo) tellGuests(ctx context.Context) error {
	d.line("  Both hosts tell their guests from now on (events.enabled), by the metadata service that is")
	d.line("  asked in public clouds, on 169.254.169.254. A guest has 15 minutes, or approves.")
	for _, n := range d.flock.Cluster.Nodes {
		n.Settings = eventsOn
		if err := errors.Join(n.Stop(), n.Start(ctx)); err != nil {
			return err
		}
	}
	return nil
}

// mayNotMove has the policy of one guest be in the way, and then have its owner asked.
func (d *demo) mayNotMove(ctx context.Context, a *cluster.Node) error {
	set := func(args ...string) error {
		args = append([]string{"policy", "set", asksFirst}, args...)
		d.command(a, args...)
		_, err := d.quietly(ctx, a, args...)
		return err
	}
	d.line("")
	d.line("  One guest is not to move, says its policy. Nothing else serves it: Belay stops no guest.")
	if err := set("--refuse", "D"); err != nil {
		return err
	}
	if _, err := updates.Write(d.dir, updates.Retire); err != nil {
		return err
	}
	d.command(a, "plan", updates.Retire+".toml")
	text, err := d.quietly(ctx, a, "plan", updates.Retire+".toml")
	_, blocked, ok := strings.Cut(text, "\nCannot be applied:\n")
	if err == nil || !ok {
		return fmt.Errorf("the plan is not blocked by the policy of %s: %w\n%s", asksFirst, err, text)
	}
	d.line("    Cannot be applied:")
	for line := range strings.Lines(blocked) {
		d.line("    %s", strings.TrimRight(line, "\n"))
	}
	d.line("")
	d.line("  So its owner is asked, and would like to say when (rung C):")
	return set("--refuse=", "--ask", "D")
}

// retire empties host a, each guest when it has approved: the web servers at once, and the
// one whose owner is asked when they have gone.
func (d *demo) retire(ctx context.Context, a *cluster.Node) (op maint.OpID, err error) {
	work, ctx := errgroup.WithContext(ctx)
	work.Go(func() (err error) {
		op, err = d.belay(ctx, a, "apply", updates.Retire+".plan")
		return err
	})
	work.Go(func() error {
		for _, g := range d.flock.Guests {
			if g.Spec.Name == asksFirst {
				continue
			}
			if err := d.approve(ctx, a, g.Spec.Name); err != nil {
				return err
			}
		}
		if err := d.awaitGone(ctx, a, asksFirst); err != nil {
			return err
		}
		e, err := a.AwaitEventInside(ctx, asksFirst)
		if err != nil {
			return err
		}
		d.line("  The others have gone; %s still runs on %s. In it, its owner looks what it is told:", asksFirst, a.Name)
		d.line("  %s# curl -H Metadata:true http://169.254.169.254%s", asksFirst, guest.EventsPath)
		d.line("    a %s, %s, not before %s", e.EventType, e.EventStatus, e.NotBefore)
		return d.approve(ctx, a, asksFirst)
	})
	return op, work.Wait()
}

// approve approves from inside a guest what it is told of.
func (d *demo) approve(ctx context.Context, n *cluster.Node, name string) error {
	e, err := n.AwaitEventInside(ctx, name)
	if err != nil {
		return err
	}
	d.line("  %s# curl -d '%s' …", name, guest.Approval(e.EventID))
	return n.ApproveInside(ctx, name, e.EventID)
}

// awaitGone waits until only one guest runs on a node.
func (d *demo) awaitGone(ctx context.Context, n *cluster.Node, but string) error {
	for {
		out, err := n.Virsh(ctx, "list", "--name")
		if err != nil || strings.TrimSpace(out) == but {
			return err
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// restore brings the guests back.
func (d *demo) restore(ctx context.Context, a, b *cluster.Node) (op maint.OpID, err error) {
	work, ctx := errgroup.WithContext(ctx)
	work.Go(func() (err error) {
		op, err = d.belay(ctx, a, "restore")
		return err
	})
	for _, g := range d.flock.Guests {
		work.Go(func() error { return d.approve(ctx, b, g.Spec.Name) })
	}
	return op, work.Wait()
}

// arrived waits until the guests that an operation of n has moved, by migrations of by, have
// their clocks put right where they went.
func (d *demo) arrived(ctx context.Context, n *cluster.Node, id maint.OpID, by *cluster.Node) error {
	op, err := n.Client().Op(ctx, id)
	if err != nil {
		return err
	}
	for _, m := range op.Moves {
		child, err := by.Client().Op(ctx, m.Op)
		if err != nil {
			return err
		}
		if err := by.AwaitArrival(ctx, &child); err != nil {
			return err
		}
	}
	return nil
}

// virsh moves all guests by virsh.
func (d *demo) virsh(ctx context.Context, from, to *cluster.Node) ([]observer.Report, error) {
	reports, err := d.plain(ctx, from, fmt.Sprintf(leaveLoop, to.PeerURI(d.flock.Lab.TLS)))
	if err != nil {
		return nil, err
	}
	d.flock.Sent(to)
	return reports, measure.SyncClocks(ctx, to)
}
