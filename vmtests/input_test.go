package vmtests

import (
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"belay/vmtests/cluster"
	"belay/vmtests/guest"
	"belay/vmtests/lab"
)

// refused runs belay and checks the exit code and that it says the words.
func (b *bed) refused(n *cluster.Node, code int, words []string, args ...string) {
	b.t.Helper()
	r, err := n.Belay(b.ctx(time.Minute), args...)
	if err != nil {
		b.t.Fatal(err)
	}
	said := r.Stdout + r.Stderr
	if r.Code != code {
		b.t.Fatalf("belay %s ended with %d, want %d:\n%s", strings.Join(args, " "), r.Code, code, said)
	}
	for _, w := range words {
		if !strings.Contains(said, w) {
			b.t.Errorf("belay %s does not say %q:\n%s", strings.Join(args, " "), w, said)
		}
	}
}

// What cannot be is refused before anything is touched, with the thing, the
// reason and the remedy. The guest does not feel it.
func TestBadInput(t *testing.T) {
	t.Parallel()
	b := newBed(t, lab.Config{})
	ctx := b.ctx(5 * time.Minute)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	const blocked = 3
	move := []string{"migrate", "web-1", "--to", "host-b"}

	b.refused(b.a, blocked, []string{"no-such-guest", "is not on host host-a", "belay guests"}, "migrate", "no-such-guest", "--to", "host-b")
	b.refused(b.a, blocked, []string{"host-x", "not configured", "host-b"}, "migrate", "web-1", "--to", "host-x")

	b.define(b.a, "off-1", "")
	b.refused(b.a, blocked, []string{"off-1", "is shut off", "start it"}, "migrate", "off-1", "--to", "host-b")

	// libvirt starts such a guest, the emulation leaving out what it cannot
	// do; another host cannot be trusted to leave out the same.
	b.define(b.a, "fancy-1", "<cpu mode='custom' match='exact' check='none'><model fallback='forbid'>Skylake-Server</model></cpu>")
	b.virsh(b.a, "start", "fancy-1")
	b.define(b.b, "fancy-1", "") // and its name is taken, both are told at once
	b.refused(b.a, blocked, []string{"cannot run the guest's CPU", "another guest named fancy-1"}, "migrate", "fancy-1", "--to", "host-b")
	b.virsh(b.a, "destroy", "fancy-1")

	op := b.begin()
	b.refused(b.a, blocked, []string{string(op.ID), "root", "belay ops abort"}, move...)
	b.refused(b.a, 0, nil, "ops", "abort", string(op.ID))
	b.refused(b.a, 70, []string{"already ended"}, "ops", "abort", string(op.ID))

	// A destination that is too small.
	must(b.b.Stop())
	b.b.Settings = "[limits]\nguest_memory = \"64MiB\"\n"
	must(b.b.Start(ctx))
	b.refused(b.a, blocked, []string{"host-b", "64 MiB", "needs 256 MiB"}, move...)

	// A peer that is not there.
	must(b.b.Stop())
	b.refused(b.a, blocked, []string{"peer host-b", "cannot be reached"}, move...)
	b.b.Settings = ""
	must(b.b.Start(ctx))

	// libvirt is down: belayd goes on serving, and says so.
	must(b.a.Host.Kill(ctx, lab.Libvirtd, syscall.SIGKILL))
	b.refused(b.a, blocked, []string{"libvirt", "systemctl status"}, move...)
	b.awaitStatus(b.a, "PROBLEM")
	b.refused(b.a, 0, []string{"web-1", "does not answer"}, "guests")
	must(b.a.StartDaemon(ctx, lab.Libvirtd))
	b.awaitStatus(b.a, "good")

	b.virsh(b.a, "undefine", "fancy-1")
	b.virsh(b.a, "undefine", "off-1")
	b.virsh(b.b, "undefine", "fancy-1") // was never touched
	b.isWhole(b.a)
}

// awaitStatus waits until belay status has the word.
func (b *bed) awaitStatus(n *cluster.Node, word string) {
	b.t.Helper()
	ctx := b.ctx(2 * time.Minute)
	for {
		r, err := n.Belay(ctx, "status")
		if err != nil {
			b.t.Fatal(err)
		}
		if r.Code != 0 {
			b.t.Fatalf("belay status ended with %d: %s", r.Code, r.Stderr)
		}
		if strings.Contains(r.Stdout, word) {
			return
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			b.t.Fatalf("belay status does not say %q:\n%s", word, r.Stdout)
		}
	}
}

// define defines a small guest without a system, with the <cpu> given.
func (b *bed) define(n *cluster.Node, name, cpu string) {
	b.t.Helper()
	xml := "<domain type='qemu'><name>" + name + "</name><memory unit='MiB'>32</memory><os><type arch='x86_64' machine='" +
		guest.Machine + "'>hvm</type></os><features><acpi/></features>" + cpu + "</domain>"
	file := b.t.TempDir() + "/guest.xml"
	if err := os.WriteFile(file, []byte(xml), 0o600); err != nil {
		b.t.Fatal(err)
	}
	b.virsh(n, "define", file)
}
