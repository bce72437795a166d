package vmtests

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/vmtests/cluster"
	"belay/vmtests/lab"
)

// images is what host n has in the folder of its disks.
func (b *bed) images(n *cluster.Node) string {
	b.t.Helper()
	entries, err := os.ReadDir(filepath.Join(n.Root(), imagesDir))
	if err != nil {
		b.t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}

// hasImages waits until host n has these.
func (b *bed) hasImages(n *cluster.Node, want string) {
	b.t.Helper()
	ctx := b.ctx(time.Minute)
	for b.images(n) != want {
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			b.t.Fatalf("%s has %q, want %q", n.Name, b.images(n), want)
		}
	}
}

// beginDisks starts a migration that copies the disk slowly, and returns when part of it
// has been copied.
func (b *bed) beginDisks() maint.Op {
	b.t.Helper()
	ctx := b.ctx(time.Minute)
	op, err := b.a.Client().Migrate(ctx, maint.MigrateRequest{Guest: "web-1", To: b.b.Name, BandwidthMiBs: 12, CopyDisks: []string{maint.CopyAll}})
	if err != nil {
		b.t.Fatal(err)
	}
	watch, stop := context.WithCancel(ctx)
	defer stop()
	under := false
	last, err := b.a.Client().Watch(watch, op.ID, func(now maint.Op) {
		if p := now.Progress; p != nil && p.DiskTotal > 0 && p.DiskTotal-p.DiskLeft > 8<<20 {
			under = true
			stop()
		}
	})
	if !under {
		b.t.Fatalf("the copy did not get under way: %v, %+v", err, last)
	}
	return op
}

// run runs a command in a host.
func (b *bed) run(n *cluster.Node, name string, args ...string) {
	b.t.Helper()
	if out, err := n.Command(b.ctx(time.Minute), name, args...).CombinedOutput(); err != nil {
		b.t.Fatalf("%s %v on %s: %v: %s", name, args, n.Name, err, out)
	}
}

// What can break while a disk is copied breaks; the guest goes on where it was with its
// disk, nothing is left of the copy, and the next one works.
func TestFaultsWhileADiskIsCopied(t *testing.T) {
	t.Parallel()
	b := newBed(t, lab.Config{}, ownDisk("web-1.raw", ""))
	path := filepath.Join(imagesDir, "web-1.raw")
	b.fill(b.a)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ctx := b.ctx(8 * time.Minute)
	mount := func(size string) { b.run(b.b, "mount", "-t", "tmpfs", "-o", "size="+size, "belay-test", imagesDir) }
	for _, c := range []struct {
		name   string
		before func()
		strike func(maint.OpID)
		after  func()
		ends   maint.Outcome
		code   maint.Code
	}{
		{"destination QEMU killed", func() {}, func(maint.OpID) { must(syscall.Kill(b.qemu("host-b"), syscall.SIGKILL)) }, func() {}, maint.OutcomeFailed, maint.CodeFailed},
		{"aborted", func() {}, func(id maint.OpID) {
			_, err := b.a.Client().Abort(ctx, id)
			must(err)
		}, func() {}, maint.OutcomeAborted, maint.CodeAborted},
		{"destination's storage full", func() { mount("100m") }, func(maint.OpID) {
			b.run(b.b, "dd", "if=/dev/zero", "of="+imagesDir+"/filler", "bs=1M", "count=60", "status=none")
		}, func() {
			b.run(b.b, "rm", imagesDir+"/filler")
			b.hasImages(b.b, "")
			b.run(b.b, "umount", imagesDir)
		}, maint.OutcomeFailed, maint.CodeFailed},
		{"aborted without the destination's belayd", func() {}, func(id maint.OpID) {
			must(b.b.Kill())
			_, err := b.a.Client().Abort(ctx, id)
			must(err)
		}, func() {
			if got := b.images(b.b); got != "web-1.raw" {
				t.Errorf("without belayd host-b has %q", got)
			}
			must(b.b.Start(ctx)) // it asks how that has ended
		}, maint.OutcomeAborted, maint.CodeAborted},
	} {
		begun := time.Now()
		c.before()
		stop := b.scribble(b.a, 2*time.Second)
		op := b.beginDisks()
		c.strike(op.ID)
		op = b.end(b.a, op.ID)
		last := stop()
		t.Logf("%s: %s after %s: %v", c.name, op.Outcome, time.Since(begun).Round(time.Millisecond), op.Problems)
		b.failedAndSays(op, c.ends, c.code)
		c.after()
		b.awaitGone(b.b)
		b.hasImages(b.b, "")
		b.isWhole(b.a)
		b.onDisk(b.a, hasPattern(last))
	}

	// Too little room is found before anything is done.
	mount("40m")
	r, err := b.a.Belay(ctx, "migrate", "web-1", "--to", "host-b", "--copy-disks")
	if err != nil || r.Code != 3 || !strings.Contains(r.Stderr, "which take up to 96 MiB") {
		t.Fatalf("%+v, %v", r, err)
	}
	b.run(b.b, "umount", imagesDir)

	// Both belayds die, and with them the copy: it is begun once more, into another file.
	b.dirty(b.a, 1)
	stop := b.scribble(b.a, 8*time.Second) // the second copy is as slow as the first, and must end
	op := b.beginDisks()
	must(b.a.Kill())
	must(b.b.Kill())
	must(syscall.Kill(b.qemu("host-b"), syscall.SIGKILL))
	b.awaitGone(b.b)
	for !strings.Contains(b.virsh(b.a, "domjobinfo", "web-1"), "None") {
		time.Sleep(50 * time.Millisecond)
	}
	must(b.b.Start(ctx))
	if got := b.images(b.b); got != "web-1.raw" {
		t.Errorf("while nobody can say what became of the guest host-b has %q", got)
	}
	must(b.a.Start(ctx))
	op = b.end(b.a, op.ID)
	last := stop()
	if op.Outcome != maint.OutcomeDone || op.Resumed != 1 {
		t.Fatalf("%s, %v", op.Outcome, op.Problems)
	}
	b.hasImages(b.b, "web-1.raw")
	b.isWhole(b.b)
	b.diskIsWhole(b.b, b.a, path, last)
}

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
