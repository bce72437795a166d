package wholehost

import (
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
)

// TestKexecPowerCut: with the power goes the memory, and every guest is told as lost.
func TestKexecPowerCut(t *testing.T) {
	inFull(t)
	e := newEstate(t)

	e.step("power is cut", func(e *estate) {
		const starting = "Starting new kernel"
		before := e.said(starting)
		op, _ := e.begin(e.boots(1))
		e.consoleSays(starting, before)
		if err := e.Cut(); err != nil {
			e.t.Fatal(err)
		}
		if err := e.Start(e.ctx(time.Minute)); err != nil {
			e.t.Fatal(err)
		}
		op = e.ends(op.ID)
		if op.Outcome != maint.OutcomeFailed || fates(op) != "db-1 lost, web-1 lost" || !has(op, maint.CodeLostGuest) {
			e.t.Fatalf("%s: %s, %+v", op.Outcome, fates(op), op.Problems)
		}
		if running, err := e.Virsh(e.ctx(time.Minute), "list", "--name"); err != nil || strings.TrimSpace(running) != "" {
			e.t.Fatalf("guests run that nobody was to start: %s (%v)", running, err)
		}
		e.autostarts()
		if _, err := e.Virsh(e.ctx(2*time.Minute), "start", "web-1"); err != nil { // as the record says
			e.t.Fatal(err)
		}
		if _, err := e.Virsh(e.ctx(2*time.Minute), "destroy", "web-1"); err != nil {
			e.t.Fatal(err)
		}
	})
}

// consoleSays waits until the host's console says a text once more than before.
func (e *estate) consoleSays(text string, before int) {
	e.t.Helper()
	ctx := e.ctx(4 * time.Minute)
	for e.said(text) <= before {
		select {
		case <-ctx.Done():
			e.t.Fatalf("the console does not say %q", text)
		case <-time.After(50 * time.Millisecond):
		}
	}
}
