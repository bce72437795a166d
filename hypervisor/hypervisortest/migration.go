package hypervisortest

import (
	"context"
	"fmt"
	"time"

	"belay/agent/maint"
	"belay/hypervisor"
)

// keepalive is how long libvirt waits for a peer that does not answer
// (keepalive_interval × keepalive_count and some).
const keepalive = 30 * time.Second

// migration is one guest on its way. w.mu guards it; run is its goroutine.
type migration struct {
	src, dst *Host
	uuid     string
	params   maint.MoveParams
	copy     Copy

	phase      Phase
	pass       int
	started    time.Time
	stopped    time.Time     // its vCPUs
	pause      time.Duration // with which it may end
	lifted     bool          // it is not held any more
	slowed     int           // the guest, per cent
	sent, left uint64        // bytes, at the end of the last pass
	wasPaused  bool          // it arrives paused, too
	sourceGone bool          // its QEMU died on the source: nothing to go back to

	post postCopy

	err      error
	over     bool
	kick     chan struct{} // closed when the copy is to go on as post-copy
	answered chan struct{} // closed when the call has its answer
	done     chan struct{} // closed when over
}

// DryRun checks what libvirt checks at the beginning of a migration.
func (h *Host) DryRun(ctx context.Context, uuid string, p maint.MoveParams) error {
	_, err := onGuest(ctx, h, "DryRun", uuid, func(g *guest) (struct{}, error) {
		if err := g.idle(); err != nil {
			return struct{}{}, err
		}
		if err := h.canCopy(g, "DomainMigrateBegin3Params", p.CopyDisks); err != nil {
			return struct{}{}, err
		}
		return struct{}{}, h.canLeave(g, "DomainMigrateBegin3Params")
	})
	return err
}

func (h *Host) canLeave(g *guest, op string) error {
	switch {
	case !g.State.Active():
		return h.failed(op, codeOperationInvalid, "Requested operation is not valid: domain is not running")
	case g.out != nil || g.in != nil:
		return h.failed(op, codeOperationInvalid,
			fmt.Sprintf("Requested operation is not valid: another migration job is already running for domain '%s'", g.Name))
	}
	return nil
}

// Migrate moves a guest to the host of the World that has the URI
// p.DestURI. When ctx ends first it returns and the migration goes on.
func (h *Host) Migrate(ctx context.Context, uuid string, p maint.MoveParams) error {
	_, err := do(ctx, h, "Migrate", false, func(ctx context.Context) (struct{}, error) {
		h.w.mu.Lock()
		interrupt := h.interrupt
		m, err := h.begin(uuid, p)
		h.w.mu.Unlock()
		if err != nil {
			return struct{}{}, err
		}
		return struct{}{}, m.answer(ctx, h, m.answered, interrupt)
	})
	return err
}

// answer waits for what libvirt has to say of a migration.
func (m *migration) answer(ctx context.Context, h *Host, answered, interrupt <-chan struct{}) error {
	select {
	case <-answered:
		h.w.mu.Lock()
		defer h.w.mu.Unlock()
		return m.err
	case <-ctx.Done():
		return hypervisor.NewError(opPerform, h.socket(), 0, "given up; a migration that has begun goes on", ctx.Err())
	case <-interrupt:
		return h.connectionLost(opPerform)
	}
}

// CameBy tells how the last guest came that came here.
func (h *Host) CameBy() maint.MoveParams {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	return h.cameBy
}

// begin makes the guest on the destination and starts the copy.
func (h *Host) begin(uuid string, p maint.MoveParams) (*migration, error) {
	g, err := h.find(uuid)
	if err != nil {
		return nil, err
	}
	if err := h.canLeave(g, opPerform); err != nil {
		return nil, err
	}
	if p.Compression != "" && p.Compression != maint.CompressXBZRLE { // as libvirt 9.0
		return nil, hypervisor.NewError(opPerform, h.socket(), codeInvalidArg, fmt.Sprintf("invalid argument: Unsupported compression method '%s'", p.Compression), maint.ErrParameter)
	}
	if err := h.canCopy(g, opPerform, p.CopyDisks); err != nil {
		return nil, err
	}
	dst := h.w.byURI(p.DestURI)
	if dst == nil || !dst.up || !reachable(h, dst) {
		return nil, h.failed(opPerform, codeSystem,
			fmt.Sprintf("unable to connect to server at '%s': Connection refused", p.DestURI))
	}
	if dst.info.UUID == h.info.UUID || dst.info.Name == h.info.Name {
		return nil, h.failed(opPerform, codeInternal,
			"internal error: Attempt to migrate guest to the same host "+dst.info.UUID)
	}
	if err := h.canPostCopy(dst, p); err != nil {
		return nil, err
	}
	for _, other := range dst.guests {
		switch {
		case other.UUID == uuid && other.State.Active():
			return nil, h.failed(opPerform, codeOperationInvalid,
				fmt.Sprintf("Requested operation is not valid: domain '%s' is already active", other.Name))
		case other.Name == g.Name && other.UUID != uuid:
			return nil, h.failed(opPerform, codeOperationFailed,
				fmt.Sprintf("operation failed: domain '%s' already exists with uuid %s", other.Name, other.UUID))
		}
	}
	if err := dst.canTake(g, p.CopyDisks); err != nil {
		return nil, err
	}

	m := &migration{
		src: h, dst: dst, uuid: uuid, params: p, copy: h.w.copy,
		phase: PhaseCopying, pass: 1, started: time.Now(),
		pause: 300 * time.Millisecond, left: g.MemoryBytes, // QEMU's default
		wasPaused: g.State == maint.GuestPaused,
		kick:      make(chan struct{}), answered: make(chan struct{}), done: make(chan struct{}),
	}
	if len(p.CopyDisks) > 0 {
		m.phase = PhaseDisks
	}
	g.out = m
	arriving := &guest{Guest: g.Guest, note: g.note, in: m, there: g.there, back: g.back}
	dst.start(arriving)
	arriving.become(maint.GuestPaused, "migrating")
	arriving.Persistent, arriving.Autostart = false, false
	if known, ok := dst.guests[uuid]; ok { // a definition it left behind
		arriving.Persistent, arriving.Autostart = true, known.Autostart
		arriving.definition = known.definition
	}
	dst.guests[uuid] = arriving
	dst.lifecycle(arriving, "started", "migrated")
	h.w.running.Go(m.run)
	return m, nil
}

func reachable(a, b *Host) bool { return !a.cut && !b.cut }

// run is the migration's course. Whatever ends it early, end has cleaned up.
func (m *migration) run() {
	if m.phase == PhaseDisks {
		m.src.w.entered(m.uuid, PhaseDisks)
		if !m.wait(m.copy.Step/2) || !m.do(func() { m.copyDisks(false) }) || !m.wait(m.copy.Step/2) || !m.do(func() { m.phase = PhaseCopying }) {
			return
		}
	}
	m.src.w.entered(m.uuid, PhaseCopying)
	for {
		if !m.waitOr(m.takes(), m.kick) {
			return
		}
		if m.toPostCopy() {
			m.postCopy()
			return
		}
		if m.passDone() {
			break
		}
	}
	if !m.step(m.suspend) || !m.wait(m.copy.Blackout) || !m.do(func() { m.copyDisks(true) }) || !m.step(func() { m.phase = PhasePerformed }) || !m.step(m.resume) || !m.wait(0) {
		return
	}
	m.step(m.confirm)
}

// wait lets time pass, and as much more as the LAN is cut. false: it is over.
func (m *migration) wait(d time.Duration) bool { return m.waitOr(d, nil) }

// waitOr is wait, and is over as soon as enough is closed.
func (m *migration) waitOr(d time.Duration, enough <-chan struct{}) bool {
	var stood time.Duration
	for {
		timer := time.NewTimer(d)
		select {
		case <-timer.C:
		case <-enough:
			timer.Stop()
			return true
		case <-m.done:
			timer.Stop()
			return false
		}
		m.src.w.mu.Lock()
		if !m.over && !reachable(m.src, m.dst) {
			d = 100 * time.Millisecond
			if stood += d; stood > keepalive {
				m.end(m.src.failed(opPerform, codeInternal,
					"internal error: connection closed due to keepalive timeout"))
			}
			m.src.w.mu.Unlock()
			continue
		}
		over := m.over
		m.src.w.mu.Unlock()
		return !over
	}
}

// takes is how long a pass over memory does.
func (m *migration) takes() time.Duration {
	m.src.w.mu.Lock()
	defer m.src.w.mu.Unlock()
	if m.copy.Writes == (Writes{}) {
		return m.copy.Step
	}
	return max(time.Millisecond, seconds(m.left, m.network()))
}

// network is how many bytes a second it takes.
func (m *migration) network() uint64 {
	n := m.copy.Writes.Network
	if m.params.Parallel > 1 {
		n *= 2
	}
	if limit := m.params.BandwidthMiBs << 20; limit > 0 {
		n = min(n, limit)
	}
	return n
}

func seconds(bytes, perSecond uint64) time.Duration {
	return time.Duration(float64(bytes) / float64(perSecond) * float64(time.Second))
}

// writes is how many bytes a second the guest does.
func (m *migration) writes() uint64 {
	return m.copy.Writes.PerSecond * uint64(100-m.slowed) / 100
}

// passDone counts a pass over memory and says whether it was the last.
func (m *migration) passDone() bool {
	m.src.w.mu.Lock()
	defer m.src.w.mu.Unlock()
	held := m.src.hold && !m.lifted
	if m.copy.Writes == (Writes{}) {
		if !held && m.pass >= m.copy.Passes {
			return true
		}
		m.pass++
		return false
	}
	written := min(m.copy.Writes.WorkingSet, uint64(seconds(m.left, m.network()).Seconds()*float64(m.writes())))
	if m.params.Slow && m.pass > 1 && written > m.left/2 {
		m.slowed = min(99, max(20, m.slowed+10)) // QEMU's cpu-throttle-initial, -increment
	}
	m.sent, m.left = m.sent+m.left, written
	if rest := seconds(m.left, m.network()); !held && rest <= m.pause {
		m.copy.Blackout = rest
		return true
	}
	m.pass++
	return false
}

// do does something, unless the migration is over, and reports whether it goes on.
func (m *migration) do(f func()) bool {
	m.src.w.mu.Lock()
	defer m.src.w.mu.Unlock()
	if !m.over {
		f()
	}
	return !m.over
}

// step makes a transition, unless the migration is over, and tells the hook.
func (m *migration) step(transition func()) bool {
	m.src.w.mu.Lock()
	if m.over {
		m.src.w.mu.Unlock()
		return false
	}
	transition()
	phase := m.phase
	m.src.w.mu.Unlock()
	m.src.w.entered(m.uuid, phase)
	return true
}

// suspend stops the guest on the source.
func (m *migration) suspend() {
	m.phase = PhaseSuspended
	if g := m.src.guests[m.uuid]; !m.wasPaused {
		m.stopped = time.Now()
		if g.State == maint.GuestPaused { // by somebody, in the copy
			return
		}
		g.become(maint.GuestPaused, "migrating")
		m.src.lifecycleAt(g, "suspended", "migrated", m.stopped)
	}
}

// resume starts the guest on the destination, with libvirt's Finish.
func (m *migration) resume() {
	m.phase = PhaseResumed
	job := m.stats()
	job.Active, job.State = false, "completed"
	job.Operation, job.MemoryLeft = "migration in", 0
	job.Downtime = m.copy.Blackout
	g := m.dst.guests[m.uuid]
	g.in, g.completed = nil, &job
	m.dst.cameBy = m.params
	g.clock = m.src.guests[m.uuid].clock
	m.persist(g)
	if m.wasPaused {
		g.become(maint.GuestPaused, "user")
		m.dst.lifecycle(g, "suspended", "paused")
		return
	}
	g.become(maint.GuestRunning, "migrated")
	m.dst.lifecycleAt(g, "resumed", "migrated", m.stopped.Add(m.copy.Blackout))
}

// persist defines the guest on the destination.
func (m *migration) persist(g *guest) {
	if !m.params.Persist {
		return
	}
	detail := "added"
	if g.Persistent {
		detail = "updated"
	}
	g.Persistent = true
	g.definition = m.src.guests[m.uuid].definition
	m.dst.lifecycle(g, "defined", detail)
}

// confirm ends the guest on the source.
func (m *migration) confirm() {
	m.phase = PhaseStopped
	g := m.src.guests[m.uuid]
	m.src.stopped(g, "migrated")
	if m.params.Persist && g.Persistent && !m.post.unattended { // nobody is left who was told to
		delete(m.src.guests, m.uuid) // libvirt sends no event for this
	}
	m.finish(nil)
}

// end stops the migration where it is, and leaves what libvirt leaves.
func (m *migration) end(err error) {
	if m.over {
		return
	}
	if m.post.begun {
		m.lose(err)
		return
	}
	inCopy := m.phase == PhaseDisks || m.phase == PhaseCopying
	if g := m.src.guests[m.uuid]; g != nil && inCopy && g.State == maint.GuestPaused && !m.wasPaused && !m.sourceGone {
		g.become(maint.GuestRunning, "migration canceled") // whoever has paused it
		m.src.lifecycle(g, "resumed", "migrated")
	}
	if g := m.src.guests[m.uuid]; g != nil && !inCopy && !m.wasPaused && !m.sourceGone {
		// Before all is sent the source goes on. After that it does so too if its
		// libvirt lives and never hears how it went: it must take the silence for a
		// failure. One that is killed leaves it stopped.
		if m.phase == PhaseSuspended || m.src.up {
			g.become(maint.GuestRunning, "migration canceled")
			m.src.lifecycle(g, "resumed", "migrated")
		}
	}
	if g := m.dst.guests[m.uuid]; g != nil && m.phase != PhaseResumed {
		m.dst.stopped(g, "failed")
		g.in = nil
	}
	m.finish(err)
}

// finish lets go of both domains and of the caller.
func (m *migration) finish(err error) {
	if g := m.src.guests[m.uuid]; g != nil {
		g.out = nil
	}
	if !m.post.unattended {
		m.err = err
		close(m.answered)
	}
	m.quit()
}

// quit ends the migration's goroutine.
func (m *migration) quit() {
	if !m.over {
		m.over = true
		close(m.done)
	}
}

// stats are the running statistics, in post-copy too.
func (m *migration) stats() maint.Job {
	job := m.memoryStats()
	m.diskStats(&job)
	if m.post.begun {
		job.PostCopy, job.Downtime = maint.PostCopyRunning, m.copy.Blackout
		if m.src.guests[m.uuid].Reason == reasonPostFailed {
			job.PostCopy = maint.PostCopyBroken
		}
	}
	return job
}

// memoryStats are those of memory: the first pass copies all, each later one a quarter of
// the one before.
func (m *migration) memoryStats() maint.Job {
	total := m.src.guests[m.uuid].MemoryBytes
	elapsed := time.Since(m.started)
	if m.copy.Writes != (Writes{}) {
		return maint.Job{
			Active: true, Operation: "migration out", State: "unbounded",
			Elapsed: elapsed, Setup: time.Millisecond, Downtime: m.pause,
			MemoryTotal: total, MemorySent: m.sent, MemoryLeft: m.left, Iteration: uint64(m.pass),
			BytesPerSecond: m.network(), DirtyPerSecond: m.writes(), SlowedPercent: m.slowed,
		}
	}
	var sent uint64
	left := total
	for range m.pass {
		sent += left
		left /= 4
	}
	job := maint.Job{
		Active: true, Operation: "migration out", State: "unbounded",
		Elapsed: elapsed, Setup: time.Millisecond, Downtime: m.copy.Blackout,
		MemoryTotal: total, MemorySent: sent, MemoryLeft: left,
		Iteration: uint64(m.pass),
	}
	if elapsed > 0 {
		job.BytesPerSecond = uint64(float64(sent) / elapsed.Seconds())
	}
	job.DirtyPerSecond = job.BytesPerSecond / 4
	return job
}
