package vmtests

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/vmtests/cluster"
	"belay/vmtests/guest"
	"belay/vmtests/lab"
	"belay/vmtests/probe"
)

const (
	imagesDir = "/var/lib/libvirt/images" // which is each lab host's own
	// The guest's disk, what of it is written before, and what all the time. MiB.
	diskMiB, writtenMiB, busyMiB = 96, 64, 16
)

// ownDisk gives the guest a disk in an image that only host-a has: over, if it is not "",
// is the image that it is an overlay of.
func ownDisk(name, over string) func(*bed, *guest.Spec) {
	return func(b *bed, s *guest.Spec) {
		b.t.Helper()
		s.Disk = filepath.Join(imagesDir, name)
		for _, n := range b.Nodes {
			if err := os.MkdirAll(n.Path(imagesDir), 0o755); err != nil {
				b.t.Fatal(err)
			}
		}
		if over == "" {
			if err := guest.CreateDisk(b.ctx(time.Minute), b.a.Path(s.Disk), diskMiB); err != nil {
				b.t.Fatal(err)
			}
			return
		}
		base := filepath.Join(b.Lab.Shared, over)
		if err := guest.CreateDisk(b.ctx(time.Minute), base, diskMiB); err != nil {
			b.t.Fatal(err)
		}
		out, err := exec.CommandContext(b.ctx(time.Minute), "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", b.a.Path(s.Disk)).CombinedOutput()
		if err != nil {
			b.t.Fatalf("%v: %s", err, out)
		}
	}
}

// onDisk asks the guest about its disk, on the host where it is.
func (b *bed) onDisk(n *cluster.Node, do func(context.Context, *guest.Control) error) {
	b.t.Helper()
	ctx := b.ctx(2 * time.Minute)
	c, err := b.guest.Dial(ctx, n)
	if err != nil {
		b.t.Fatal(err)
	}
	defer c.Close()
	if err := do(ctx, c); err != nil {
		b.t.Fatal(err)
	}
}

// fill writes the part of the disk that is written before it is copied.
func (b *bed) fill(n *cluster.Node) {
	b.t.Helper()
	b.onDisk(n, func(ctx context.Context, c *guest.Control) error {
		_, err := c.DiskWrite(ctx, probe.DiskSettings{Seed: 1, SizeMiB: writtenMiB})
		return err
	})
}

// scribble has the guest write one pattern after the other to the beginning of its disk,
// each so long after the one before as it says, until stop is called or the connection
// ends with its host. stop gives the last that was begun.
func (b *bed) scribble(n *cluster.Node, every time.Duration) (stop func() uint64) {
	b.t.Helper()
	ctx, cancel := context.WithCancel(b.t.Context())
	c, err := b.guest.Dial(ctx, n)
	if err != nil {
		b.t.Fatal(err)
	}
	ended, seed := make(chan struct{}), uint64(1)
	go func() {
		defer close(ended)
		for {
			seed++
			if _, err := c.DiskWrite(ctx, probe.DiskSettings{Seed: seed, SizeMiB: busyMiB}); err != nil {
				return // which of its writes was the last is seen in what is there
			}
			select {
			case <-time.After(every): // a rate, not a wait
			case <-ctx.Done():
				return
			}
		}
	}()
	return func() uint64 { cancel(); <-ended; c.Close(); return seed }
}

// hasPattern checks that the guest's disk has what scribble had it write last.
func hasPattern(last uint64) func(context.Context, *guest.Control) error {
	return func(ctx context.Context, c *guest.Control) error {
		var said []string
		for _, seed := range []uint64{last, last - 1} { // the last may not have come to the guest
			r, err := c.DiskVerify(ctx, probe.DiskSettings{Seed: seed, SizeMiB: busyMiB})
			if err == nil && r.BadBlocks == 0 {
				return nil
			}
			said = append(said, fmt.Sprintf("pattern %d: %d bad blocks, %v", seed, r.BadBlocks, err))
		}
		return fmt.Errorf("the disk does not have what the guest wrote last: %s", strings.Join(said, "; "))
	}
}

// diskIsWhole checks on the guest's host that its disk has what it wrote last, and that
// the rest is as it was on the other.
func (b *bed) diskIsWhole(n, other *cluster.Node, path string, last uint64) {
	b.t.Helper()
	b.onDisk(n, hasPattern(last))
	here, there := b.rawImage(n, path), b.rawImage(other, path)
	if len(here) != len(there) || !bytes.Equal(here[busyMiB<<20:], there[busyMiB<<20:]) || bytes.Count(here[busyMiB<<20:writtenMiB<<20], []byte{0}) > 1<<20 {
		b.t.Fatalf("%s is not the same on both hosts", path)
	}
}

// rawImage is what a guest reads from an image of a host.
func (b *bed) rawImage(n *cluster.Node, path string) []byte {
	b.t.Helper()
	raw := filepath.Join(b.t.TempDir(), "raw")
	out, err := exec.CommandContext(b.ctx(time.Minute), "qemu-img", "convert", "-U", "-O", "raw", n.Path(path), raw).CombinedOutput()
	if err != nil {
		b.t.Fatalf("%v: %s", err, out)
	}
	text, err := os.ReadFile(raw)
	if err != nil {
		b.t.Fatal(err)
	}
	return text
}

// secretly has everything of guests go by TLS, through a network of its own.
func (b *bed) secretly() {
	b.t.Helper()
	ctx := b.ctx(time.Minute)
	if err := b.Lab.AddMigrationNetwork(ctx); err != nil {
		b.t.Fatal(err)
	}
	for _, n := range b.Nodes {
		n.Settings = fmt.Sprintf("[migration]\ntls = true\naddress = %q\n", n.MigrationAddr())
		if err := n.Stop(); err != nil {
			b.t.Fatal(err)
		}
		if err := n.Start(ctx); err != nil {
			b.t.Fatal(err)
		}
	}
}

// A guest whose disk is on one host only moves when it is asked for, with all that it
// writes meanwhile; the old image is left, named, and in the way of the way back.
func TestMoveWithDisk(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, image, over string
		secret            bool // by TLS, through a network of its own
	}{
		{"raw", "web-1.raw", "", false},
		{"overlay", "web-1.qcow2", "base.raw", true}, // in the short form by TestDiskByTransport
	} {
		if c.secret && !long() {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t, lab.Config{TLS: c.secret}, ownDisk(c.image, c.over))
			path := filepath.Join(imagesDir, c.image)
			if c.secret {
				b.secretly()
			}
			b.fill(b.a)

			var vs []maint.MoveVerdict
			if err := b.a.BelayJSON(b.ctx(time.Minute), &vs, "guests", "--why"); err != nil {
				t.Fatal(err)
			}
			if len(vs) != 1 || vs[0].CanMove || len(vs[0].Copies) != 1 || vs[0].Copies[0].Target != "vda" || vs[0].Copies[0].Bytes != diskMiB<<20 {
				t.Fatalf("%+v", vs)
			}
			t.Logf("%+v", vs[0].Copies[0])
			r, err := b.a.Belay(b.ctx(time.Minute), "migrate", "web-1", "--to", "host-b")
			if err != nil || r.Code != 3 || !strings.Contains(r.Stderr, "--copy-disks") {
				t.Fatalf("%+v, %v", r, err)
			}

			stop := b.scribble(b.a, 2*time.Second)
			link := map[bool]string{true: lab.MigrationLink, false: lab.Uplink}[c.secret]
			came := b.received(b.b, link)
			op := b.migrate(b.a, b.b, "--copy-disks", "--bandwidth", "40", "--timeout", "90s")
			last := stop()
			if came = b.received(b.b, link) - came; came < writtenMiB<<20 {
				t.Errorf("the disk did not come by %s, only %d MiB did", link, came>>20)
			}
			t.Logf("moved in %s, downtime %s, %d patterns written: %+v", op.Move.Total, op.Move.Downtime, last, op.Steps)
			b.isWhole(b.b)
			b.diskIsWhole(b.b, b.a, path, last)
			for _, n := range b.Nodes {
				info, err := os.Stat(n.Path(path))
				if err != nil {
					t.Fatal(err)
				}
				t.Logf("%s: %d bytes, %d allocated", n.Name, info.Size(), info.Sys().(*syscall.Stat_t).Blocks*512)
			}

			r, err = b.b.Belay(b.ctx(time.Minute), "migrate", "web-1", "--to", "host-a", "--copy-disks")
			if err != nil || r.Code != 3 || !strings.Contains(r.Stderr, "operation "+string(op.ID)+" left it") || !strings.Contains(r.Stderr, "rm "+path) {
				t.Fatalf("%+v, %v", r, err)
			}
			if err := os.Remove(b.a.Path(path)); err != nil {
				t.Fatal(err)
			}
			stop = b.scribble(b.b, 0) // faster than the limit lets it be copied
			op = b.migrate(b.b, b.a, "--copy-disks=vda", "--allow", "slow", "--bandwidth", "24", "--timeout", "90s")
			last = stop()
			t.Logf("back in %s, downtime %s, %d patterns written", op.Move.Total, op.Move.Downtime, last)
			b.isWhole(b.a)
			b.diskIsWhole(b.a, b.b, path, last)
		})
	}
}
