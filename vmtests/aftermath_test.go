package vmtests

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"belay/agent/maint"
	"belay/vmtests/cluster"
	"belay/vmtests/guest"
)

// holds checks what must be after every operation, and says where the guest is.
func (m *matrix) holds(op maint.Op) *cluster.Node {
	m.t.Helper()
	place := m.from
	switch op.Outcome {
	case maint.OutcomeDone:
		place = m.to
	case maint.OutcomePartly:
		place = m.to
		m.remedy(op)
	case maint.OutcomeFailed, maint.OutcomeAborted, maint.OutcomeBlocked:
	default:
		m.t.Fatalf("outcome %q: %v", op.Outcome, op.Problems)
	}
	if op.Outcome == maint.OutcomeFailed || op.Outcome == maint.OutcomeAborted {
		if p := op.Problems[0]; !strings.Contains(p.Reason, " on "+m.from.Name+" as before") {
			m.t.Errorf("the record does not say where the guest runs: %+v", p)
		}
	}
	empty := m.other(place)
	m.eventually("what is left on "+empty.Name, func() error {
		if pids, err := empty.Guests(); err != nil || len(pids) > 0 {
			return fmt.Errorf("QEMU processes %v, %w", pids, err)
		}
		out, err := empty.Virsh(m.ctx(20*time.Second), "list", "--all", "--name")
		if err != nil || strings.TrimSpace(out) != "" {
			return fmt.Errorf("domains %q, %w", strings.TrimSpace(out), err)
		}
		return nil
	})
	m.eventually("the reservation", func() error {
		s, err := m.to.Client().Status(m.ctx(20 * time.Second))
		if err != nil || len(s.Reservations) > 0 && !toLapse(op) {
			return fmt.Errorf("%+v, %w", s.Reservations, err)
		}
		return nil
	})
	m.isWhole(place)
	m.onDisk(place, (*guest.Control).DiskVerify)
	return place
}

// ended checks what must be when the guest itself was killed where it had just come to:
// it goes on at most once, and the record says how it is.
func (m *matrix) ended(op maint.Op) string {
	m.t.Helper()
	here, err := m.from.Guests()
	m.must(err)
	there, err := m.to.Guests()
	m.must(err)
	how := fmt.Sprintf(" runs on %d + %d: %s %v", len(here), len(there), notes(op), op.Problems)
	switch op.Outcome {
	case maint.OutcomeDone:
		if len(here)+len(there) > 0 || m.virsh(m.from, "list", "--all", "--name") != "" || m.virsh(m.to, "list", "--all", "--name") != "web-1" {
			m.t.Errorf("it has moved and ended;%s", how)
		}
	case maint.OutcomeFailed:
		m.isWhole(m.from)
	case maint.OutcomeStuck:
		if len(there) > 0 || op.Problems[0].Remedy == "" {
			m.t.Errorf("nobody is told what to do;%s", how)
		}
	default:
		m.t.Errorf("outcome %q;%s", op.Outcome, how)
	}
	return how
}

// toLapse reports whether the operation says that its reservation could not be given up.
func toLapse(op maint.Op) bool {
	return op.Outcome == maint.OutcomePartly && op.Problems[0].Code == maint.CodeJournal || slices.ContainsFunc(op.Steps, func(s maint.Step) bool {
		return slices.ContainsFunc(s.Notes, func(n string) bool { return strings.Contains(n, "it will lapse") })
	})
}

// remedy does what the record of an operation that was done partly asks of a person.
func (m *matrix) remedy(op maint.Op) {
	m.t.Helper()
	for _, p := range op.Problems {
		switch p.Code {
		case maint.CodeJournal: // room is made
		case maint.CodeUnverified: // its definition could not be settled
			m.virsh(m.to, "autostart", "web-1")
		case maint.CodeLeftover:
			m.virsh(m.from, "destroy", "web-1")
			if m.virsh(m.from, "list", "--all", "--name") != "" {
				m.virsh(m.from, "undefine", "--keep-nvram", "web-1")
			}
		default:
			m.t.Fatalf("nothing is known to be done about %+v", p)
		}
	}
}

func (m *matrix) eventually(what string, f func() error) {
	m.t.Helper()
	for ctx := m.ctx(30 * time.Second); ; {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			m.t.Fatalf("%s: %v", what, err)
		}
	}
}
