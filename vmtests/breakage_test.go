package vmtests

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"belay/vmtests/cluster"
	"belay/vmtests/lab"
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
	// from is the first moment at which it makes sense; "" is any.
	from moment
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
			m.hurry(never)
			m.awaitGone(m.from)
		}, mend: func(m *matrix) { m.must(m.from.Start(m.ctx(time.Minute))) }, from: copying},
		{name: "source libvirtd", strike: func(m *matrix) { m.killLibvirt(m.from) }, mend: func(m *matrix) { m.startLibvirt(m.from) }, from: checking},
		{name: "destination libvirtd", strike: func(m *matrix) { m.killLibvirt(m.to) }, mend: func(m *matrix) { m.startLibvirt(m.to) }, from: checking},
		{name: "destination QEMU", strike: func(m *matrix) { m.killArriving() }, from: copying},
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

// killArriving kills the destination's QEMU, which may be gone already.
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

// fill leaves no room in what the node's journal is on.
func (m *matrix) fill(n *cluster.Node) {
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
