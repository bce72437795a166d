package measure

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"belay/vmtests/cluster"
)

// identity is what a guest is known by.
type identity struct {
	boot     string // ID of its kernel's boot
	checksum uint64 // of the memory that it never writes
}

// Prove returns an error unless the guest is the one that was started, with all
// its memory, runs on the host where it must be and nowhere else, and is
// defined there and nowhere else.
func (b *Bed) Prove(ctx context.Context) error {
	is, err := b.look(ctx)
	switch {
	case err != nil:
		return err
	case is.boot != b.first.boot:
		return fmt.Errorf("guest %s has rebooted: boot ID %s, was %s", b.name(), is.boot, b.first.boot)
	case is.checksum != b.first.checksum:
		return fmt.Errorf("memory of guest %s is damaged: checksum %x, was %x", b.name(), is.checksum, b.first.checksum)
	}
	var errs []error
	for _, n := range b.Cluster.Nodes {
		errs = append(errs, b.proveOn(ctx, n, n == b.At()))
	}
	return errors.Join(errs...)
}

// look asks the guest, on the host where it must be, and has it check its memory.
func (b *Bed) look(ctx context.Context) (is identity, err error) {
	c, s, err := b.dial(ctx)
	if err != nil {
		return is, err
	}
	defer c.Close()
	m, err := c.Verify(ctx)
	if err != nil {
		return is, err
	}
	if !m.OK() {
		return is, fmt.Errorf("memory of guest %s is damaged: %d of %d pages, ledger bad: %t", b.name(), m.BadPages, m.Pages, m.BadLedger)
	}
	return identity{boot: s.BootID, checksum: m.FixedChecksum}, nil
}

// proveOn checks that the guest runs and is defined on n, or neither.
func (b *Bed) proveOn(ctx context.Context, n *cluster.Node, want bool) error {
	for what, args := range map[string][]string{
		"running": {"list", "--name"},
		"defined": {"list", "--all", "--persistent", "--name"},
	} {
		out, err := n.Virsh(ctx, args...)
		if err != nil {
			return err
		}
		if got := slices.Contains(strings.Fields(out), b.name()); got != want {
			return fmt.Errorf("guest %s on %s: %s is %t, want %t", b.name(), n.Name, what, got, want)
		}
	}
	return nil
}
