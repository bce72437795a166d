package measure

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"belay/vmtests/cluster"
)

// Proof is what shows that a guest is the one that was started, and whole.
type Proof struct {
	Host     string        // that has the only running copy and the only definition
	BootID   string        // of the guest's kernel
	Uptime   time.Duration // of the guest's kernel
	Pages    uint64        // of memory that were checked, 4096 bytes each
	Checksum uint64        // of the memory that the guest never writes
	Dirtied  uint64        // bytes that the guest has written since it was told to
}

// Prove returns an error unless the guest is the one that was started, with all
// its memory, runs on the host where it must be and nowhere else, and is
// defined there and nowhere else.
func (b *Bed) Prove(ctx context.Context) error {
	_, err := b.Proof(ctx)
	return err
}

// Proof is [Bed.Prove], and tells what it has seen.
func (b *Bed) Proof(ctx context.Context) (Proof, error) {
	p, err := b.look(ctx)
	switch {
	case err != nil:
		return p, err
	case p.BootID != b.first.BootID:
		return p, fmt.Errorf("guest %s has rebooted: boot ID %s, was %s", b.name(), p.BootID, b.first.BootID)
	case p.Checksum != b.first.Checksum:
		return p, fmt.Errorf("memory of guest %s is damaged: checksum %x, was %x", b.name(), p.Checksum, b.first.Checksum)
	}
	var errs []error
	for _, n := range b.Cluster.Nodes {
		errs = append(errs, b.proveOn(ctx, n, n == b.At()))
	}
	return p, errors.Join(errs...)
}

// look asks the guest, on the host where it must be.
func (b *Bed) look(ctx context.Context) (p Proof, err error) {
	c, s, err := b.dial(ctx)
	if err != nil {
		return p, err
	}
	defer c.Close()
	m, err := c.Verify(ctx)
	if err != nil {
		return p, err
	}
	if !m.OK() {
		return p, fmt.Errorf("memory of guest %s is damaged: %d of %d pages, ledger bad: %t", b.name(), m.BadPages, m.Pages, m.BadLedger)
	}
	return Proof{Host: b.At().Name, BootID: s.BootID, Uptime: s.Uptime, Pages: m.Pages, Checksum: m.FixedChecksum, Dirtied: s.Memory.Dirtied}, nil
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
