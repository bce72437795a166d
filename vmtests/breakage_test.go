package vmtests

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"belay/agent/maint"
	"belay/vmtests/cluster"
	"belay/vmtests/lab"
	"belay/vmtests/pki"
)

// fault is something that breaks, and how it is mended.
type fault struct {
	name   string
	strike func(*matrix)
	// mend is called at once; or when the operation has ended, or the source's libvirt
	// has given the copy up, if the fault lasts. nil: there is nothing to mend.
	mend  func(*matrix)
	lasts bool
	// spares says that the copy goes on: one that is held back at that moment is let go.
	spares bool
	// from and to are the first and the last moment at which it makes sense; "" is any.
	from, to moment
	// kills says that it ends the guest itself: see ended.
	kills bool
}

// faults are all there are. A further one needs a line here, and cells in cells.
func faults() []fault {
	return []fault{
		{name: "source belayd", spares: true, strike: func(m *matrix) { m.must(m.from.Kill()) },
			mend: func(m *matrix) { m.must(m.from.Start(m.ctx(time.Minute))) }, from: checking},
		{name: "destination belayd", spares: true, strike: func(m *matrix) { m.must(m.to.Kill()) },
			mend: func(m *matrix) { m.must(m.to.Start(m.ctx(time.Minute))) }, from: checking},
		{name: "both belayds", spares: true, strike: func(m *matrix) { m.must(errors.Join(m.from.Kill(), m.to.Kill())) },
			mend: func(m *matrix) {
				m.must(errors.Join(m.from.Start(m.ctx(time.Minute)), m.to.Start(m.ctx(time.Minute))))
			}, from: checking},
		{name: "source belayd, away", strike: func(m *matrix) {
			m.must(m.from.Kill())
			if m.at == copying { // later it goes on by itself
				m.hurry(never)
			}
			m.awaitGone(m.from)
		}, mend: func(m *matrix) { m.must(m.from.Start(m.ctx(time.Minute))) }, from: copying},
		{name: "source libvirtd", strike: func(m *matrix) { m.killLibvirt(m.from) }, mend: func(m *matrix) { m.startLibvirt(m.from) }, from: checking},
		{name: "destination libvirtd", strike: func(m *matrix) { m.killLibvirt(m.to) }, mend: func(m *matrix) { m.startLibvirt(m.to) }, from: checking},
		{name: "destination QEMU", strike: func(m *matrix) { m.killArriving() }, from: copying, to: switching},
		{name: "the moved guest", strike: func(m *matrix) { m.killArriving() }, from: finishing, kills: true},
		{name: "LAN cut", strike: func(m *matrix) { m.must(m.to.SetLink(m.ctx(10*time.Second), false)) },
			mend: func(m *matrix) { m.must(m.to.SetLink(m.ctx(10*time.Second), true)) }, lasts: true, from: checking},
		{name: "LAN silent", strike: func(m *matrix) { m.link.Loss(100) }, mend: func(m *matrix) { m.link.Perfect() }, lasts: true, from: checking},
		{name: "10 % loss", spares: true, strike: func(m *matrix) { m.link.Loss(10) }, mend: func(m *matrix) { m.link.Perfect() }, lasts: true},
		{name: "200 ms delay", spares: true, strike: func(m *matrix) { m.link.Delay(200 * time.Millisecond) }, mend: func(m *matrix) { m.link.Perfect() }, lasts: true},
		{name: "state_dir full", spares: true, strike: func(m *matrix) { m.fill(m.to) }, mend: func(m *matrix) { m.empty(m.to) }, lasts: true},
		// Where libvirt keeps what belongs to a running guest, and definitions.
		{name: "libvirt folder full", spares: true, strike: func(m *matrix) { m.cover(m.to, "/var/lib/libvirt/qemu") },
			mend: func(m *matrix) { m.uncover(m.to, "/var/lib/libvirt/qemu") }, lasts: true},
		{name: "definitions full", spares: true, strike: func(m *matrix) { m.cover(m.to, "/etc/libvirt/qemu") },
			mend: func(m *matrix) { m.uncover(m.to, "/etc/libvirt/qemu") }, lasts: true},
		{name: "ports taken", spares: true, strike: func(m *matrix) { m.takePorts(m.to) }, mend: func(m *matrix) { m.freePorts() }, lasts: true},
		// belayd's own; those of libvirt and QEMU are in TestTransport.
		{name: "certificate expired", spares: true, strike: func(m *matrix) { m.certify(m.to, m.to.Name, -time.Hour) },
			mend: func(m *matrix) { m.certify(m.to, m.to.Name, time.Hour) }, lasts: true},
		{name: "certificate of another", spares: true, strike: func(m *matrix) { m.certify(m.to, "host-z", time.Hour) },
			mend: func(m *matrix) { m.certify(m.to, m.to.Name, time.Hour) }, lasts: true},
		{name: "abort", strike: func(m *matrix) {
			_, err := m.from.Client().Abort(m.ctx(time.Minute), m.op.ID)
			m.abortRefused = err != nil // it may have ended
		}, from: checking},
	}
}

func (m *matrix) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

func (m *matrix) killLibvirt(n *cluster.Node) {
	m.t.Helper()
	m.must(n.Host.Kill(m.ctx(20*time.Second), lab.Libvirtd, syscall.SIGKILL))
}

func (m *matrix) startLibvirt(n *cluster.Node) {
	m.t.Helper()
	m.must(n.StartDaemon(m.ctx(time.Minute), lab.Libvirtd))
}

// killArriving kills the destination's QEMU, if there is one.
func (m *matrix) killArriving() {
	m.t.Helper()
	pids, err := m.to.Guests()
	m.must(err)
	for _, pid := range pids {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			m.t.Fatal(err)
		}
	}
}

// certify has the node's belayd be one with a certificate for a name, that is good for so
// long.
func (m *matrix) certify(n *cluster.Node, name string, life time.Duration) {
	m.t.Helper()
	ca := pki.Open(filepath.Dir(m.Lab.CAFile()))
	m.must(n.Kill()) // and its connections with it
	m.must(ca.IssueHostUntil(time.Now().Add(life), name, net.IP(n.Addr.AsSlice())))
	m.must(os.Rename(ca.CertFile(name), n.CertFile()))
	m.must(os.Rename(ca.KeyFile(name), n.KeyFile()))
	m.must(n.Start(m.ctx(time.Minute)))
}

// fill leaves no room for the node's journal: neither on the disk, nor in what the file
// has. It is the node's own word that this is so.
func (m *matrix) fill(n *cluster.Node) {
	m.t.Helper()
	m.ballast(n)
	full := func(err error) bool {
		p := new(maint.Problem)
		if err != nil && !(errors.As(err, &p) && p.Code == maint.CodeJournal) {
			m.t.Fatal(err)
		}
		return err != nil
	}
	for ctx := m.ctx(time.Minute); ; {
		if _, err := n.Client().Cordon(ctx, ""); full(err) {
			return // as for all that is longer than that
		}
		if full(n.Client().Uncordon(ctx)) {
			m.empty(n)
			m.must(n.Client().Uncordon(ctx))
			m.ballast(n)
		}
	}
}

// ballast takes all room of what the node's journal is on.
func (m *matrix) ballast(n *cluster.Node) {
	m.t.Helper()
	file, err := os.Create(filepath.Join(n.Root(), n.StateDir(), "ballast"))
	m.must(err)
	defer file.Close()
	for size := 64 << 10; size > 0; {
		if _, err := file.Write(make([]byte, size)); errors.Is(err, syscall.ENOSPC) {
			size /= 2
		} else {
			m.must(err)
		}
	}
}

func (m *matrix) empty(n *cluster.Node) {
	m.t.Helper()
	m.must(os.Remove(filepath.Join(n.Root(), n.StateDir(), "ballast")))
}

// smallState gives the node's journal a small file system of its own.
func (m *matrix) smallState(n *cluster.Node) {
	m.t.Helper()
	m.must(n.Stop())
	m.inside(n, "mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "state", n.StateDir())
	m.must(n.Start(m.ctx(time.Minute)))
}

// cover puts a file system that has no room for anything over a folder.
func (m *matrix) cover(n *cluster.Node, dir string) {
	m.t.Helper()
	m.inside(n, "mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=1", "full", dir)
}

func (m *matrix) uncover(n *cluster.Node, dir string) {
	m.t.Helper()
	m.inside(n, "umount", "-l", dir)
}

func (m *matrix) inside(n *cluster.Node, name string, args ...string) {
	m.t.Helper()
	if out, err := n.Command(m.ctx(20*time.Second), name, args...).CombinedOutput(); err != nil {
		m.t.Fatalf("%s on %s: %v\n%s", name, n.Name, err, out)
	}
}

// takePorts listens on all that libvirt gives to incoming migrations: migration_port_min
// to migration_port_max of qemu.conf.
func (m *matrix) takePorts(n *cluster.Node) {
	m.t.Helper()
	m.must(n.InNet(func() error {
		for port := 49152; port <= 49215; port++ {
			l, err := net.Listen("tcp4", fmt.Sprintf("0.0.0.0:%d", port))
			if errors.Is(err, syscall.EADDRINUSE) {
				continue // the copy that runs has it
			}
			if err != nil {
				return err
			}
			m.taken = append(m.taken, l)
		}
		return nil
	}))
}

func (m *matrix) freePorts() {
	for _, l := range m.taken {
		_ = l.Close()
	}
	m.taken = nil
}
