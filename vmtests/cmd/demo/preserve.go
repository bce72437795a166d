package main

import (
	"context"

	"belay/vmtests/cluster"
)

// preserve services the guest's host, and then its QEMU, under it.
func (d *demo) preserve(ctx context.Context) error {
	host, name := d.bed.At(), d.bed.Guest.Spec.Name
	d.line("  The guest is held while a command runs on the host, here one that takes half a second.")
	if err := d.felt(ctx, host, "hold", "--all", "--reason", "demonstration", "--", "sleep", "0.5"); err != nil {
		return err
	}
	if err := d.belay(ctx, host, nil, "clock", name); err != nil {
		return err
	}
	d.line("")
	d.line("  Then it gets a new QEMU, the old one's memory staying where it is.")
	if err := d.belay(ctx, host, nil, "replace-vmm", name, "--dry-run"); err != nil {
		return err
	}
	return d.felt(ctx, host, "replace-vmm", name, "--method", "in-place")
}

// felt runs one belay command and tells what the LAN saw of it.
func (d *demo) felt(ctx context.Context, n *cluster.Node, args ...string) error {
	mark := d.bed.Observer.Mark()
	if err := d.belay(ctx, n, nil, args...); err != nil {
		return err
	}
	r, err := d.bed.Since(ctx, mark)
	if err != nil {
		return err
	}
	d.line("")
	d.line("  On the LAN the guest was silent for %s; heartbeats lost in the network: %d.", millis(r.Pause()), r.Lost)
	if err := d.bed.Prove(ctx); err != nil {
		return err
	}
	d.line("  It is whole: boot ID, memory checksums.")
	d.line("")
	return nil
}
