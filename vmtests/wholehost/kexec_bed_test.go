package wholehost

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/vmtests/guest"
	"belay/vmtests/machine"
	"belay/vmtests/probe"
)

// estate is a host whose kernel is changed, and its guests: web-1, and db-1, which has a disk
// and starts with the host. Both write memory all the time.
type estate struct {
	*machine.Host
	t       *testing.T
	kernels []string
	guests  []*tenant
	booted  string // the guest that libvirt starts with the host, "" without one
}

// tenant is a guest of an estate.
type tenant struct {
	*bed
	name string
	disk *probe.DiskReport // what it has written there, nil without a disk
}

const (
	diskMiB  = 8
	diskSeed = 7
)

// newEstate brings one up.
func newEstate(t *testing.T) *estate {
	t.Helper()
	b := newEmptyBed(t, machine.Config{})
	e := &estate{Host: b.Hosts[0], t: t, kernels: b.Image.Kernels, guests: []*tenant{{bed: b, name: "web-1"}}, booted: "db-1"}
	const disk = "/var/lib/libvirt/images/db-1.qcow2"
	must(t, e.Host, "qemu-img", "create", "-q", "-f", "qcow2", disk, "64M")
	db := &tenant{bed: b.within(t), name: "db-1"}
	guests := b.start(e.Host, web1(guest.Spec{}), guest.Spec{Name: db.name, IP: netip.MustParsePrefix("10.77.1.2/16"), Disk: disk})
	b.guest, db.guest = guests[0], guests[1]
	b.meet()
	db.probe(e.Host, func(ctx context.Context, c *guest.Control) error {
		r, err := c.DiskWrite(ctx, probe.DiskSettings{SizeMiB: diskMiB, Seed: diskSeed})
		db.disk = &r
		return err
	})
	db.meet()
	e.guests = append(e.guests, db)
	if _, err := e.Virsh(b.ctx(time.Minute), "autostart", db.name); err != nil {
		t.Fatal(err)
	}
	return e
}

// of has the estate and its guests report to a test.
func (e *estate) of(t *testing.T) {
	e.t = t
	for _, g := range e.guests {
		g.t = t
	}
}

func (e *estate) ctx(d time.Duration) context.Context { return e.guests[0].ctx(d) }

// step runs a subtest, unless one before has failed: they build on each other.
func (e *estate) step(name string, f func(e *estate)) {
	e.t.Helper()
	if whole := e.t; !whole.Failed() {
		defer e.of(whole)
		whole.Run(name, func(t *testing.T) {
			e.of(t)
			f(e)
		})
	}
}

// longStep is step in the long form.
func (e *estate) longStep(name string, f func(e *estate)) {
	e.t.Helper()
	e.step(name, func(e *estate) { inFull(e.t); f(e) })
}

// are checks that the guests named, all if none is, go on where they were: each is the one
// that was started, with its memory and what is on its disk, and alive.
func (e *estate) are(names ...string) {
	e.t.Helper()
	for _, g := range e.guests {
		if len(names) > 0 && !slices.Contains(names, g.name) {
			continue
		}
		s, m := g.look(e.Host)
		if s.BootID != g.first.BootID {
			e.t.Fatalf("guest %s has booted: boot ID %s, was %s", g.name, s.BootID, g.first.BootID)
		}
		if !m.OK() || m.FixedChecksum != g.mem.FixedChecksum {
			e.t.Fatalf("memory of guest %s is damaged: %+v, was %+v", g.name, m, g.mem)
		}
		if g.disk != nil {
			g.probe(e.Host, func(ctx context.Context, c *guest.Control) error {
				r, err := c.DiskVerify(ctx, probe.DiskSettings{SizeMiB: diskMiB, Seed: diskSeed})
				if err == nil && (r.BadBlocks > 0 || r.Checksum != g.disk.Checksum) {
					err = fmt.Errorf("its disk is damaged: %+v, was %+v", r, *g.disk)
				}
				return err
			})
		}
		if err := g.obs.Await(e.ctx(2*time.Minute), g.name, 20); err != nil {
			e.t.Fatal(err)
		}
	}
	e.autostarts()
}

// autostarts checks that libvirt starts with the host the guest that it did, and no other.
func (e *estate) autostarts() {
	e.t.Helper()
	if got, err := e.Virsh(e.ctx(time.Minute), "list", "--all", "--autostart", "--name"); err != nil || strings.TrimSpace(got) != e.booted {
		e.t.Fatalf("%q start with the host (%v), want %q", strings.TrimSpace(got), err, e.booted)
	}
}

// meet takes a guest for the one that it is by now.
func (e *estate) meet(name string) {
	e.t.Helper()
	for _, g := range e.guests {
		if g.name == name {
			g.bed.meet()
		}
	}
}

// boots is the i-th kernel of the image, without guests named: all.
func (e *estate) boots(i int) maint.KexecRequest {
	return maint.KexecRequest{Kernel: "/boot/vmlinuz-" + e.kernels[i], Initrd: "/boot/initrd.img-" + e.kernels[i], All: true, Reason: "test"}
}

// begin begins a change of kernel.
func (e *estate) begin(r maint.KexecRequest) (maint.Op, string) {
	e.t.Helper()
	boot, err := e.BootID(e.ctx(time.Minute))
	if err != nil {
		e.t.Fatal(err)
	}
	c := e.Client()
	defer c.Close()
	op, err := c.Kexec(e.ctx(time.Minute), r)
	if err != nil {
		e.t.Fatalf("%v: %+v", err, r)
	}
	return op, boot
}

// await waits until an operation is so, over boots of the host.
func (e *estate) await(id maint.OpID, what string, is func(maint.Op) bool) (op maint.Op) {
	e.t.Helper()
	ctx := e.ctx(10 * time.Minute)
	c := e.Client()
	defer c.Close()
	var err error
	for {
		var now maint.Op
		once, cancel := context.WithTimeout(ctx, 30*time.Second)
		if now, err = c.Op(once, id); err == nil {
			if op = now; is(op) {
				cancel()
				return op
			}
		}
		cancel()
		select {
		case <-ctx.Done():
			e.t.Fatalf("operation %s does not come to %s: %v, %+v", id, what, err, op)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// ends waits for an operation's end.
func (e *estate) ends(id maint.OpID) maint.Op {
	e.t.Helper()
	op := e.await(id, "its end", func(op maint.Op) bool { return op.State == maint.OpEnded })
	if r, err := e.Belay(e.ctx(time.Minute), "ops", "show", string(id)); err == nil {
		e.t.Logf("%s%s", r.Stdout, r.Stderr)
	}
	return op
}

// runs waits for the kernel's having the release.
func (e *estate) runs(release string) {
	e.t.Helper()
	if got := must(e.t, e.Host, "uname", "-r"); got != release {
		e.t.Fatalf("the host runs kernel %s, want %s", got, release)
	}
}

// configure puts a drop-in beside belayd's configuration, for the next belayd.
func (e *estate) configure(text string) {
	e.t.Helper()
	if _, err := e.Script(e.ctx(time.Minute), "cat >/etc/belay/belayd.d/test.toml <<'EOF'\n"+text+"\nEOF\n"); err != nil {
		e.t.Fatal(err)
	}
}

// restart has another belayd, with what is configured.
func (e *estate) restart() {
	e.t.Helper()
	if _, err := e.Script(e.ctx(2*time.Minute), "systemctl reset-failed belayd.service; systemctl restart belayd.service"); err != nil {
		e.t.Fatal(err)
	}
	ctx := e.ctx(time.Minute)
	c := e.Client()
	defer c.Close()
	for {
		s, err := c.Status(ctx)
		if err == nil && s.Host.Name != "" { // libvirt has answered, too
			return
		}
		select {
		case <-ctx.Done():
			e.t.Fatalf("belayd does not answer: %v, %+v", err, s)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// said is how often the host's console has said a text.
func (e *estate) said(text string) int {
	e.t.Helper()
	all, err := e.Console()
	if err != nil {
		e.t.Fatal(err)
	}
	return strings.Count(all, text)
}

// fates are what became of guests.
func fates(op maint.Op) string {
	var all []string
	if op.Kexeced != nil {
		for _, g := range op.Kexeced.Guests {
			all = append(all, g.Guest+" "+string(g.Fate))
		}
	}
	slices.Sort(all)
	return strings.Join(all, ", ")
}

func has(op maint.Op, code maint.Code) bool {
	return slices.ContainsFunc(op.Problems, func(p maint.Problem) bool { return p.Code == code })
}

// damage changes a byte in the middle of what is saved of a guest.
func (e *estate) damage(name string) {
	e.t.Helper()
	uuid, err := e.Virsh(e.ctx(time.Minute), "domuuid", name)
	if err != nil {
		e.t.Fatal(err)
	}
	_, err = e.Script(e.ctx(time.Minute), fmt.Sprintf(`f=/var/lib/belay/memory/%s.save
at=$(($(stat -c %%s "$f") / 2))
was=$(od -An -tu1 -j $at -N 1 "$f")
printf "\\$(printf %%o $((was ^ 1)))" | dd of="$f" bs=1 seek=$at conv=notrunc status=none`, strings.TrimSpace(uuid)))
	if err != nil {
		e.t.Fatal(err)
	}
}
