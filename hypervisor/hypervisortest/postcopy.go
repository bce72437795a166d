package hypervisortest

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"belay/agent/maint"
)

// tcp is how long QEMU believes that the way to the other host stands, once it does not.
const tcp = 15 * time.Minute

// postCopy is what a migration is in post-copy.
type postCopy struct {
	told       bool // to go on as post-copy
	begun      bool // the destination runs the guest
	unattended bool // no call of libvirt's is at work on it
	broken     bool // the source's QEMU has lost the other one, and waits to be told
	deaf       bool // the destination's has not noticed
	resumed    int  // how often it was: each time it gets a new connection
	heldOut    bool // a cut network does not end that
	heldIn     bool
	lost       bool // one of them is gone
}

// Reasons of a guest in post-copy.
const (
	reasonPost       = "post-copy"
	reasonPostFailed = "post-copy failed"
)

// canPostCopy refuses what QEMU refuses as a copy begins that can go on as post-copy.
func (h *Host) canPostCopy(dst *Host, p maint.MoveParams) error {
	why := ""
	var major, minor int
	_, _ = fmt.Sscanf(h.info.QEMUVersion, "%d.%d", &major, &minor)
	switch {
	case !p.PostCopy:
	case dst.noPost:
		why = "Postcopy is not supported: Userfaultfd not available"
	case p.Parallel > 0 && (major < 10 || major == 10 && minor < 1):
		why = "Postcopy is not yet compatible with multifd"
	}
	if why == "" {
		return nil
	}
	return h.failed(opPerform, codeInternal, "internal error: unable to execute QEMU command 'migrate-set-capabilities': "+why)
}

// StartPostCopy has the guest's migration go on as post-copy.
func (h *Host) StartPostCopy(ctx context.Context, uuid string) error {
	const op = "DomainMigrateStartPostCopy"
	_, err := onGuest(ctx, h, "StartPostCopy", uuid, func(g *guest) (struct{}, error) {
		switch {
		case g.out == nil:
			return struct{}{}, h.failed(op, codeOperationInvalid,
				"Requested operation is not valid: post-copy can only be started while outgoing migration is in progress", maint.ErrNoJob)
		case !g.out.params.PostCopy:
			return struct{}{}, h.failed(op, codeOperationInvalid,
				"Requested operation is not valid: switching to post-copy requires migration to be started with VIR_MIGRATE_POSTCOPY flag", maint.ErrNoJob)
		}
		if !g.out.post.told {
			g.out.post.told = true
			close(g.out.kick)
		}
		return struct{}{}, nil
	})
	return err
}

// ResumePostCopy takes up a migration again that is broken in post-copy.
func (h *Host) ResumePostCopy(ctx context.Context, uuid string, _ maint.MoveParams) error {
	_, err := do(ctx, h, "ResumePostCopy", false, func(ctx context.Context) (struct{}, error) {
		h.w.mu.Lock()
		interrupt := h.interrupt
		m, err := h.takeUp(uuid)
		if err != nil {
			h.w.mu.Unlock()
			return struct{}{}, err
		}
		answered := m.answered
		h.w.mu.Unlock()
		return struct{}{}, m.answer(ctx, h, answered, interrupt)
	})
	return err
}

func (h *Host) takeUp(uuid string) (*migration, error) {
	g, err := h.find(uuid)
	if err != nil {
		return nil, err
	}
	invalid := func(format string) error {
		return h.failed(opPerform, codeOperationInvalid, "Requested operation is not valid: "+fmt.Sprintf(format, g.Name))
	}
	m := g.out
	switch {
	case m == nil:
		return nil, invalid("domain '%s' is not being migrated")
	case !m.post.begun:
		return nil, invalid("migration of domain %s is not in post-copy phase")
	case !m.post.unattended:
		return nil, invalid("migration of domain %s is being actively monitored by another thread")
	case !m.dst.up || !reachable(h, m.dst):
		return nil, h.failed(opPerform, codeSystem, fmt.Sprintf("unable to connect to server at '%s': No route to host", m.params.DestURI))
	case !m.post.broken || m.post.deaf || m.post.lost:
		return nil, h.failed(opPerform, codeOperationInvalid, "Requested operation is not valid: QEMU reports migration is still running")
	}
	m.post.broken, m.post.unattended, m.post.heldOut, m.post.heldIn = false, false, false, false
	m.post.resumed++
	m.answered, m.err = make(chan struct{}), nil
	g.become(maint.GuestPaused, reasonPost)
	if there := m.dst.guests[uuid]; there.State == maint.GuestRunning {
		there.become(maint.GuestRunning, reasonPost)
	}
	return m, nil
}

// BreakPostCopy has both QEMUs lose each other, as when their connection is reset.
func (h *Host) BreakPostCopy(t testing.TB, uuid string) {
	t.Helper()
	h.change(t, uuid, func(g *guest) {
		if g.out == nil || !g.out.post.begun {
			t.Fatalf("guest %s is not in post-copy", g.Name)
		}
		g.out.part("operation failed: job 'migration out' failed in post-copy phase")
	})
}

// toPostCopy reports whether the migration has been told to go on as post-copy.
func (m *migration) toPostCopy() bool {
	m.src.w.mu.Lock()
	defer m.src.w.mu.Unlock()
	return m.post.told
}

// postCopy is the migration's course from there: the guest is stopped, started on the
// destination, and runs on there until all its memory has come.
func (m *migration) postCopy() {
	if !m.step(m.suspend) || !m.wait(m.copy.Blackout) || !m.step(m.start) {
		return
	}
	const step = 20 * time.Millisecond
	var cut time.Duration
	for left := m.copy.PostCopy; ; {
		select {
		case <-time.After(step):
		case <-m.done:
			return
		}
		m.src.w.mu.Lock()
		switch {
		case m.over:
			m.src.w.mu.Unlock()
			return
		case m.post.broken || m.post.lost:
			cut = 0
		case !reachable(m.src, m.dst):
			if cut += step; cut >= keepalive {
				m.lose(m.src.failed(opPerform, codeInternal, "internal error: client socket is closed"))
			}
			if cut >= tcp && !(m.post.heldOut && m.post.heldIn) { // the destination has nothing to send
				m.part("operation failed: job 'migration out' failed in post-copy phase")
			}
		default:
			cut = 0
			if !m.src.hold || m.lifted {
				left -= step
			}
		}
		m.src.w.mu.Unlock()
		if left <= 0 {
			break
		}
	}
	// QEMU is done; each libvirt sees it when it is there.
	if !m.await(m.dst) || !m.step(m.arrive) || !m.await(m.src) {
		return
	}
	m.step(m.confirm)
}

// await waits until a host's libvirt runs. false: the migration is over.
func (m *migration) await(h *Host) bool {
	for {
		m.src.w.mu.Lock()
		up, over := h.up, m.over
		m.src.w.mu.Unlock()
		if up || over {
			return !over
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-m.done:
			return false
		}
	}
}

// start starts the guest on the destination, before its memory is there.
func (m *migration) start() {
	m.phase, m.post.begun = PhasePostCopy, true
	m.src.guests[m.uuid].become(maint.GuestPaused, reasonPost)
	m.src.lifecycle(m.src.guests[m.uuid], "suspended", "post-copy")
	g := m.dst.guests[m.uuid]
	m.persist(g)
	g.clock = m.src.guests[m.uuid].clock
	g.become(maint.GuestRunning, reasonPost)
	m.dst.lifecycle(g, "resumed", "post-copy")
}

// arrive is the end of post-copy on the destination, which has no statistics of it.
func (m *migration) arrive() {
	m.phase = PhaseResumed
	g := m.dst.guests[m.uuid]
	g.in, g.completed = nil, nil
	if g.State == maint.GuestRunning {
		g.become(maint.GuestRunning, "migrated")
	}
	m.dst.lifecycle(g, "resumed", "migrated")
}

// lose is what libvirt makes of losing sight of the other host in post-copy: it gives its
// caller up, and leaves the rest to QEMU.
func (m *migration) lose(err error) {
	if !m.post.unattended {
		m.post.unattended, m.err = true, err
		close(m.answered)
	}
	if g := m.src.guests[m.uuid]; g != nil && g.State == maint.GuestPaused && m.src.up {
		g.become(maint.GuestPaused, reasonPostFailed)
	}
}

// part is the source's QEMU losing sight of the other one, which hears of it where the
// network carries that.
func (m *migration) part(message string) {
	m.lose(m.src.failed(opPerform, codeOperationFailed, message))
	m.post.broken = true
	if g := m.src.guests[m.uuid]; g != nil && g.State.Active() {
		g.become(maint.GuestPaused, reasonPostFailed)
	}
	if m.post.deaf = !reachable(m.src, m.dst); !m.post.deaf {
		m.notice()
	}
}

// notice is the destination's QEMU giving up its connection.
func (m *migration) notice() {
	m.post.deaf = false
	if g := m.dst.guests[m.uuid]; g != nil && g.State == maint.GuestRunning {
		g.become(maint.GuestRunning, reasonPostFailed)
	}
}

// HoldOut has a cut network not end the connection by which a guest leaves.
func (h *Host) HoldOut(ctx context.Context, uuid string, _, _ uint16) ([]maint.Connection, error) {
	return onGuest(ctx, h, "HoldOut", uuid, func(g *guest) ([]maint.Connection, error) {
		m := g.out
		if m == nil || m.over || m.post.broken {
			return nil, nil
		}
		m.post.heldOut = true
		return []maint.Connection{m.post.connection()}, nil
	})
}

// connection is the one that a migration has: any does that is no other one's.
func (p *postCopy) connection() maint.Connection {
	from, to := netip.AddrFrom4([4]byte{192, 0, 2, 1}), netip.AddrFrom4([4]byte{192, 0, 2, 2})
	return maint.Connection{From: netip.AddrPortFrom(from, 40000+uint16(p.resumed)), To: netip.AddrPortFrom(to, 49152)}
}

// HoldIn is HoldOut on the host to which a guest comes.
func (h *Host) HoldIn(ctx context.Context, uuid string, all []maint.Connection) (int, error) {
	return onGuest(ctx, h, "HoldIn", uuid, func(g *guest) (int, error) {
		m := g.in
		if m == nil || m.over || m.post.broken && !m.post.deaf || !slices.Contains(all, m.post.connection()) {
			return 0, nil
		}
		m.post.heldIn = true
		return 1, nil
	})
}

// Sever has the guest's QEMU notice that the connection by which it comes is dead; one that
// is not breaks by it.
func (h *Host) Sever(ctx context.Context, uuid string, all []maint.Connection) (int, error) {
	return onGuest(ctx, h, "Sever", uuid, func(g *guest) (int, error) {
		m := g.in
		switch {
		case m == nil || !m.post.begun || m.post.broken && !m.post.deaf || !slices.Contains(all, m.post.connection()):
			return 0, nil
		case !m.post.broken:
			m.part("operation failed: job 'migration out' failed in post-copy phase")
		}
		m.notice()
		return 1, nil
	})
}

// migrationStatus is QEMU's word for how a guest's migration is.
func (g *guest) migrationStatus() string {
	m := g.out
	if m == nil {
		m = g.in
	}
	switch {
	case m == nil:
		return "none"
	case !m.post.begun:
		return "active"
	case m.post.broken && (g.out != nil || !m.post.deaf):
		return "postcopy-paused"
	}
	return "postcopy-active"
}

// halve is what is left of a migration in post-copy when one of its QEMUs has gone.
func (m *migration) halve() {
	m.part("operation failed: domain is not running")
	m.post.lost = true
	m.quit()
}
