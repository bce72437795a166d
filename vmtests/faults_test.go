package vmtests

import (
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/vmtests/lab"
)

// failedAndSays checks that the operation failed and its record says so in
// words that help.
func (b *bed) failedAndSays(op maint.Op, outcome maint.Outcome, code maint.Code) {
	b.t.Helper()
	if op.Outcome != outcome || len(op.Problems) == 0 {
		b.t.Fatalf("outcome %q, %v; want %q", op.Outcome, op.Problems, outcome)
	}
	p := op.Problems[0]
	if p.Code != code || p.Reason == "" || !strings.Contains(p.Error(), "runs on host-a as before") {
		b.t.Fatalf("the record does not say what happened: %+v", p)
	}
}

// What can break in the middle of a copy breaks; the guest goes on where it
// was, nothing of it is left on the destination, and the next move works.
func TestFaultsInTheMiddle(t *testing.T) {
	t.Parallel()
	b := newBed(t, lab.Config{})
	ctx := b.ctx(8 * time.Minute)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name   string
		strike func()
		mend   func()
	}{
		{"destination libvirtd killed",
			func() { must(b.b.Host.Kill(ctx, lab.Libvirtd, syscall.SIGKILL)) },
			func() { must(b.b.StartDaemon(ctx, lab.Libvirtd)) }},
		{"destination QEMU killed",
			func() { must(syscall.Kill(b.qemu("host-b"), syscall.SIGKILL)) },
			func() {}},
		{"source libvirtd killed",
			func() { must(b.a.Host.Kill(ctx, lab.Libvirtd, syscall.SIGKILL)) },
			func() { must(b.a.StartDaemon(ctx, lab.Libvirtd)) }},
		{"network cut",
			func() { must(b.b.SetLink(ctx, false)) },
			func() { must(b.b.SetLink(ctx, true)) }},
	} {
		begun := time.Now()
		op := b.begin()
		c.strike()
		if c.name == "network cut" { // found out by libvirt's keepalive
			op = b.end(b.a, op.ID)
			c.mend()
		} else {
			c.mend()
			op = b.end(b.a, op.ID)
		}
		t.Logf("%s: %s after %s: %v", c.name, op.Outcome, time.Since(begun).Round(time.Millisecond), op.Problems)
		b.failedAndSays(op, maint.OutcomeFailed, maint.CodeFailed)
		b.awaitGone(b.b)
		b.isWhole(b.a)
	}

	op := b.begin()
	_, err := b.a.Client().Abort(ctx, op.ID)
	must(err)
	b.failedAndSays(b.end(b.a, op.ID), maint.OutcomeAborted, maint.CodeAborted)
	b.isWhole(b.a)

	b.migrate(b.a, b.b)
	b.isWhole(b.b)
}

// qemu is the process of the guest on the named host.
func (b *bed) qemu(host string) int {
	b.t.Helper()
	text, err := os.ReadFile(b.Lab.Host(host).Path("/run/libvirt/qemu/web-1.pid"))
	if err != nil {
		b.t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		b.t.Fatal(err)
	}
	return pid
}
