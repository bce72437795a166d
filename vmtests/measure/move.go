package measure

import (
	"bufio"
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"belay/agent/maint"
	"belay/vmtests/cluster"
	"belay/vmtests/observer"
)

// The tools that are compared.
const (
	Belay = "belay"
	Virsh = "virsh"
)

const (
	// settled is how many heartbeats must have come from the destination
	// before an outage is taken for over: 0.2 s at 1 kHz.
	settled = 200
	// settleTimeout is how long they may take.
	settleTimeout = 30 * time.Second
	// rest is how long the guest is left in peace before it is moved. One that
	// has just arrived is busy: under TCG all its code is translated anew.
	rest = time.Second
)

// Move is what was measured of one migration.
type Move struct {
	Tool       string        `json:"tool"`
	From       string        `json:"from"`
	To         string        `json:"to"`
	Outage     time.Duration `json:"outage_ns"`   // the longest silence on the LAN
	Downtime   time.Duration `json:"downtime_ns"` // QEMU's measure of its switch-over
	Total      time.Duration `json:"total_ns"`    // the command, from its start to its exit
	MemorySent uint64        `json:"memory_sent_bytes"`

	// Copy is libvirt's measure of the whole job.
	Copy time.Duration `json:"copy_ns"`
	// Op is Belay's own account, nil for virsh.
	Op     *maint.Op       `json:"op,omitempty"`
	Report observer.Report `json:"report"`
}

// Belay moves the guest to the other host by belay migrate.
func (b *Bed) Belay(ctx context.Context) (Move, error) {
	return b.move(ctx, Belay, func(ctx context.Context, from, to *cluster.Node, m *Move) error {
		var op maint.Op
		begin := time.Now()
		args := []string{"migrate", b.name(), "--to", to.Name}
		if b.BandwidthMiBs > 0 {
			args = append(args, "--bandwidth", fmt.Sprint(b.BandwidthMiBs))
		}
		for _, means := range b.Allow {
			args = append(args, "--allow", string(means))
		}
		err := from.BelayJSON(ctx, &op, args...)
		m.Total = time.Since(begin)
		switch {
		case err != nil:
			return err
		case op.Outcome != maint.OutcomeDone || op.Move == nil:
			return fmt.Errorf("operation %s: outcome %s, and no measurements", op.ID, op.Outcome)
		}
		// What its new host does for the guest is not to disturb the next move.
		if err := from.AwaitArrival(ctx, &op); err != nil {
			return err
		}
		m.Op = &op
		m.Downtime, m.MemorySent, m.Copy = op.Move.Downtime, op.Move.MemorySent, op.Move.Copy
		return nil
	})
}

// virshArgs is the virsh command that does what Belay does: it moves a running
// guest and its definition, its memory as plainly as belayd does by default.
func virshArgs(guest, destination string) []string {
	return []string{"migrate", "--live", "--p2p", "--persistent", "--undefinesource", guest, destination}
}

// Virsh moves the guest to the other host by virsh migrate.
func (b *Bed) Virsh(ctx context.Context) (Move, error) {
	return b.move(ctx, Virsh, func(ctx context.Context, from, to *cluster.Node, m *Move) error {
		begin := time.Now()
		args := virshArgs(b.name(), to.PeerURI(b.Lab.TLS))
		if b.BandwidthMiBs > 0 {
			args = append(args, "--bandwidth", fmt.Sprint(b.BandwidthMiBs))
		}
		_, err := from.Virsh(ctx, args...)
		m.Total = time.Since(begin)
		if err != nil {
			return err
		}
		stats, err := to.Virsh(ctx, "domjobinfo", b.name(), "--completed", "--rawstats")
		if err != nil {
			return err
		}
		return m.parse(stats)
	})
}

// move lets f move the guest and observes what the LAN sees of it.
func (b *Bed) move(ctx context.Context, tool string, f func(ctx context.Context, from, to *cluster.Node, m *Move) error) (Move, error) {
	from, to := b.At(), b.Other()
	m := Move{Tool: tool, From: from.Name, To: to.Name}
	if err := pause(ctx, rest); err != nil {
		return m, err
	}
	mark := b.Observer.Mark()
	if err := f(ctx, from, to, &m); err != nil {
		return m, fmt.Errorf("cannot move guest %s from %s to %s by %s: %w", b.name(), m.From, m.To, tool, err)
	}
	b.at = 1 - b.at
	var err error
	m.Report, err = b.since(ctx, mark)
	m.Outage = m.Report.Pause()
	return m, err
}

// since waits until the guest has been heard for a while and reports what the
// LAN has seen of it since mark. It is an error if the guest was restarted or
// the observer itself has lost heartbeats.
func (b *Bed) since(ctx context.Context, mark observer.Mark) (observer.Report, error) {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	if err := b.Observer.Await(ctx, b.name(), settled); err != nil {
		return observer.Report{}, err
	}
	r := b.Observer.Since(mark, b.name())
	switch {
	case r.Restarts != 0:
		return r, fmt.Errorf("guest %s was restarted on the way", b.name())
	case r.Truncated:
		return r, fmt.Errorf("the move of guest %s took longer than the observer remembers", b.name())
	}
	return r, nil
}

// parse reads virsh domjobinfo --rawstats, lines of "name: value" after
// virTypedParameter's names (VIR_DOMAIN_JOB_*); times are in ms.
func (m *Move) parse(stats string) error {
	values := map[string]uint64{}
	for s := bufio.NewScanner(strings.NewReader(stats)); s.Scan(); {
		name, value, _ := strings.Cut(s.Text(), ":")
		if n, err := strconv.ParseUint(strings.TrimSpace(value), 10, 64); err == nil {
			values[strings.TrimSpace(name)] = n
		}
	}
	for name, set := range map[string]func(uint64){
		"downtime":         func(n uint64) { m.Downtime = time.Duration(n) * time.Millisecond },
		"time_elapsed":     func(n uint64) { m.Copy = time.Duration(n) * time.Millisecond },
		"memory_processed": func(n uint64) { m.MemorySent = n },
	} {
		n, ok := values[name]
		if !ok {
			return fmt.Errorf("virsh domjobinfo tells no %s:\n%s", name, stats)
		}
		set(n)
	}
	return nil
}

// Abort ends a migration that a tool has left behind, and returns when there is none.
func (b *Bed) Abort(ctx context.Context) error {
	_, _ = b.At().Virsh(ctx, "domjobabort", b.name()) // it may have ended by itself
	for {
		out, err := b.At().Virsh(ctx, "domjobinfo", b.name())
		if err != nil || strings.Contains(out, "None") {
			return err
		}
		if err := pause(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
}
