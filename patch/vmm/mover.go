package vmm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"belay/agent/maint"
)

// Seat is a guest in a QEMU that it can leave for another one, while its memory stays in its
// files: all that is needed for that, and is known beforehand.
type Seat struct {
	Guest     string   `json:"guest"`
	UUID      string   `json:"uuid"`
	ID        int      `json:"id"`  // libvirt's number of the domain
	Old       process  `json:"old"` // its QEMU
	UID       int      `json:"uid"` // of that
	GID       int      `json:"gid"`
	Bandwidth uint64   `json:"bandwidth"`        // of its migrations, as it was, bytes per second
	XML       string   `json:"xml,omitempty"`    // to start the new QEMU from
	Memory    []string `json:"memory,omitempty"` // the files to be linked
	Kept      string   `json:"kept,omitempty"`   // the folder of the links
}

// folder is where libvirt makes a folder for the memory of each domain.
func (s Seat) folder() string { return filepath.Dir(filepath.Dir(s.Memory[0])) }

// Mover has guests leave and enter QEMUs in place: Replacement within one boot of the host,
// package kexec over a boot.
type Mover struct {
	Host   Host
	Places Places

	pace *pace
}

func (m Mover) paced() pace {
	if m.pace != nil {
		return *m.pace
	}
	p := usual()
	p.handOver, p.load = time.Minute, time.Minute // over a boot, some seconds are no matter
	return p
}

// ErrForeign: the guest is in a QEMU that somebody else has started.
var ErrForeign = errors.New("somebody else has started it")

// ErrPaused: somebody has paused the guest since it was looked at.
var ErrPaused = errors.New("somebody has paused it meanwhile")

// Seat looks at a guest that runs, and changes nothing. It gives all that stands in the way of
// its leaving its QEMU in place, over a boot too, or else its seat, without Kept. token is what tells the
// QEMU that it is to enter from any other.
func (m Mover) Seat(ctx context.Context, uuid, token string) (s Seat, against []maint.Problem, err error) {
	f, err := Survey(ctx, m.Host, m.Places, uuid)
	if err != nil {
		return s, nil, err
	}
	if f.Guarded != "" {
		return s, []maint.Problem{guarded(f)}, nil
	}
	if against := slices.Concat(unfit(f), inPlaceProblems(f), overBootProblems(f)); len(against) > 0 {
		return s, against, nil
	}
	d, err := m.Host.Describe(ctx, uuid)
	if err != nil {
		return s, nil, err
	}
	s, err = m.seat(ctx, f, d.Portable, token)
	return s, nil, err
}

// seat is what every way of leaving a QEMU needs to know.
func (f Facts) seat() (s Seat, err error) {
	if f.process.PID == 0 {
		err = errors.New("its QEMU is not found among the processes")
	}
	return Seat{Guest: f.Guest.Name, UUID: f.Guest.UUID, ID: f.Guest.ID, Old: f.process, UID: f.UID, GID: f.GID}, err
}

func (m Mover) seat(ctx context.Context, f Facts, portable, token string) (s Seat, err error) {
	if s, err = f.seat(); err != nil {
		return s, err
	}
	if s.Bandwidth, err = bandwidth(ctx, m.Host, s.UUID); err != nil {
		return s, err
	}
	if s.XML, err = incoming(portable, token); err != nil {
		return s, err
	}
	for _, b := range f.Memory {
		if b.Ours {
			s.Memory = append(s.Memory, b.Path)
		}
	}
	var dirs []string
	for _, path := range s.Memory {
		dirs = append(dirs, filepath.Dir(path))
	}
	slices.Sort(dirs)
	if dirs = slices.Compact(dirs); len(dirs) != 1 {
		return s, fmt.Errorf("its memory is in %d folders of libvirt's: %q", len(dirs), dirs)
	}
	return s, nil
}

// Keep links the guest's memory into the folder Kept, whose parent is there: it stays when
// libvirt removes its own links. It may be done over.
func (m Mover) Keep(s Seat) error {
	kept := m.Places.at(s.Kept)
	if err := privateDir(kept); err != nil {
		return err
	}
	for _, path := range s.Memory {
		if err := link(m.Places.at(path), filepath.Join(kept, filepath.Base(path))); err != nil {
			return err
		}
	}
	return nil
}

// Order is what libvirt's hook is told, to give the memory to the QEMU that has the token: three
// lines, the first of which is a word and the token.
func (s Seat) Order(word, token string) string {
	return fmt.Sprintf("%s %s\n%s\n%s\n", word, token, s.Kept, s.folder())
}

// Linger has libvirt find the end of the guest's QEMU at once, if it ends before letGo is called.
func (m Mover) Linger(s Seat) (letGo func()) { return m.Places.linger(s.Old) }

// Leave pauses the guest and takes the state of its devices; one that is paused already is ErrPaused.
// before is called right before the pause, and may call it off. When it returns nil the QEMU has sent all away and waits for End or
// Back; after an error Back has the guest run on, if it was paused.
func (m Mover) Leave(ctx context.Context, s Seat, before func(context.Context) error) (state []byte, err error) {
	return m.leave(ctx, s, before, new(timing))
}

func (m Mover) leave(ctx context.Context, s Seat, before func(context.Context) error, t *timing) (state []byte, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, m.paced().handOver, errors.New("QEMU does not hand its state over in time"))
	defer cancel()
	ln, path, err := m.Places.listen(s.ID, outSocket, s.UID, s.GID)
	if err != nil {
		return nil, err
	}
	defer ln.Close()
	stream := receive(ctx, ln)
	if err := setBandwidth(ctx, m.Host, s.UUID, unlimited); err != nil {
		return nil, err
	}
	switch state, reason, err := m.Host.State(ctx, s.UUID); {
	case err != nil:
		return nil, err
	case state == maint.GuestPaused: // and would run when it has got its new QEMU
		return nil, fmt.Errorf("%w (%s)", ErrPaused, reason)
	}
	if err := before(ctx); err != nil {
		return nil, err
	}

	t.begin()
	if err := m.Host.Suspend(ctx, s.UUID); err != nil {
		return nil, err
	}
	t.mark("suspend")
	if err := m.unchanged(ctx, s); err != nil {
		return nil, err
	}
	if err := setIgnoreShared(ctx, m.Host, s.UUID, true); err != nil {
		return nil, err
	}
	if err := ask(ctx, m.Host, s.UUID, "migrate", map[string]any{"uri": "unix:" + path}, nil); err != nil {
		return nil, err
	}
	select {
	case <-stream.done:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if stream.err != nil {
		return nil, fmt.Errorf("cannot receive the state: %w", stream.err)
	}
	return stream.state, m.postMigrate(ctx, s)
}

// unchanged is an error if the QEMU that the guest is to enter would have other devices than the one that
// it is in: one that was plugged since has a state that none would take, and one that was unplugged would
// be there again.
func (m Mover) unchanged(ctx context.Context, s Seat) error {
	d, err := m.Host.Describe(ctx, s.UUID)
	if err != nil {
		return err
	}
	same, err := sameDevices(s.XML, d.Portable)
	if err == nil && !same {
		err = errors.New("its devices, or vCPUs, were changed since they were looked at: begin again")
	}
	return err
}

// Alive reports whether the QEMU that the guest is to leave is there.
func (m Mover) Alive(s Seat) bool { return m.Places.alive(s.Old) }

// Back has the guest run on in the QEMU that it has not left, and may be done over. The state that
// Leave took is out of date then: drop it before. After End it is for a guest that is ErrResumed alone.
func (m Mover) Back(ctx context.Context, s Seat) error {
	if err := m.resume(ctx, s, m.tryOld); err != nil {
		return err
	}
	return m.resetOld(ctx, s)
}

// resume resumes the guest in its old QEMU, and tries for as long as a lease or libvirt is away.
func (m Mover) resume(ctx context.Context, s Seat, try func(context.Context, Seat) error) error {
	ctx, cancel := context.WithTimeout(ctx, m.paced().libvirt)
	defer cancel()
	step := 2 * time.Millisecond
	for {
		err := try(ctx, s)
		if err == nil {
			return nil
		}
		if !wait(ctx, step) {
			return err
		}
		step = min(2*step, time.Second)
	}
}

// tryOld tries once, out of "postmigrate" too. A migration under way would stop the guest again
// when it ends: it comes to its end first.
func (m Mover) tryOld(ctx context.Context, s Seat) error {
	sent, err := queryMigrate(ctx, m.Host, s.UUID)
	if err != nil {
		return err
	}
	if sent.underway() {
		_ = ask(ctx, m.Host, s.UUID, "migrate_cancel", nil, nil) // what came of it is asked next time
		return fmt.Errorf("the migration of its state is still %s", sent.Status)
	}
	_ = setIgnoreShared(ctx, m.Host, s.UUID, false) // before it runs; resetOld must succeed with it
	return m.Host.Resume(ctx, s.UUID)
}

// Enter starts a QEMU on the memory that is kept, with its vCPUs stopped, and gives it the state.
// One that an earlier call has started goes on from where that has got. A guest that somebody else
// has started is ErrForeign, and left alone. After any other error it may be done over.
func (m Mover) Enter(ctx context.Context, s Seat, token string, state []byte) error {
	g, err := m.Host.Guest(ctx, s.UUID)
	if err != nil && !absent(err) {
		return err
	}
	if err != nil || !g.State.Active() {
		start, cancel := context.WithTimeout(ctx, m.paced().start)
		defer cancel()
		if err := m.Host.CreatePaused(start, s.XML); err != nil {
			return err
		}
		if g, err = m.Host.Guest(ctx, s.UUID); err != nil {
			return err
		}
	}
	d, err := m.Host.Describe(ctx, s.UUID)
	if err != nil {
		return err
	}
	x, err := parseDomain(d.Live)
	if err != nil {
		return err
	}
	if x.token() != token {
		return ErrForeign
	}
	now, err := runState(ctx, m.Host, s.UUID)
	if err == nil && now == runIncoming {
		err = m.pour(ctx, s, g.ID, state)
	}
	if err != nil {
		return err
	}
	// Before it runs: from then on somebody may save it. It does not stand still for want of that: see Settle.
	_ = setIgnoreShared(ctx, m.Host, s.UUID, false)
	return nil
}

// TakesMemory sees that a save of the guest by libvirt takes its memory along, whatever a Belay that died
// has left in its QEMU. Where memory is no shared file, it is taken along in any case.
func (m Mover) TakesMemory(ctx context.Context, g maint.Guest) error {
	if g.MemorySource == "" && !g.MemoryShared {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, m.paced().ask)
	defer cancel()
	_, on, err := hasIgnoreShared(ctx, m.Host, g.UUID)
	if err == nil && on {
		err = setIgnoreShared(ctx, m.Host, g.UUID, false)
	}
	if err != nil {
		return fmt.Errorf("its save could be without its memory: %w", err)
	}
	return nil
}

// Settle sees that what Enter has set in the new QEMU, in which the guest runs by now, is taken back: a
// migration by libvirt must take its memory along.
func (m Mover) Settle(ctx context.Context, s Seat) error { return m.forget(ctx, s.UUID) }

// LeftBehind says that Settle has failed, and what is to be done before the guest is saved or migrated.
func (s Seat) LeftBehind(err error) *maint.Problem {
	return maint.Problemf(maint.CodeUnverified, "guest "+s.Guest, "before it is saved or migrated: virsh qemu-monitor-command "+maint.ShellWord(s.Guest)+
		` '{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"x-ignore-shared","state":false}]}}'`,
		"runs in its new QEMU, in which a migration would leave its memory behind: %v", err)
}

func (m Mover) forget(ctx context.Context, uuid string) error {
	ctx, cancel := context.WithTimeout(ctx, m.paced().libvirt)
	defer cancel()
	for step := 50 * time.Millisecond; ; step = min(2*step, 2*time.Second) {
		err := setIgnoreShared(ctx, m.Host, uuid, false)
		if err == nil {
			_, on, asked := hasIgnoreShared(ctx, m.Host, uuid)
			if err = asked; err == nil && !on {
				return nil
			}
		}
		if absent(err) || !wait(ctx, step) {
			return err
		}
	}
}

// postMigrate waits until QEMU says that it has sent all.
func (m Mover) postMigrate(ctx context.Context, s Seat) error {
	for {
		state, err := runState(ctx, m.Host, s.UUID)
		if err != nil {
			return err
		}
		if state == runPostMigrate {
			return nil
		}
		sent, err := queryMigrate(ctx, m.Host, s.UUID)
		if err != nil {
			return err
		}
		if sent.Status == "failed" || sent.Status == "cancelled" {
			return fmt.Errorf("QEMU could not hand its state over: %s %s", sent.Status, sent.Error)
		}
		if !wait(ctx, pollEvery) {
			return context.Cause(ctx)
		}
	}
}

// resetOld takes back what handOver set in the old QEMU, and its socket, which
// a belayd that was killed has left.
func (m Mover) resetOld(ctx context.Context, s Seat) error {
	if path, err := m.Places.socket(s.ID, outSocket); err == nil {
		_ = os.Remove(m.Places.at(path))
	}
	ctx, cancel := context.WithTimeout(ctx, m.paced().ask)
	defer cancel()
	return errors.Join(
		setIgnoreShared(ctx, m.Host, s.UUID, false),
		setBandwidth(ctx, m.Host, s.UUID, s.Bandwidth))
}

// pour gives the new QEMU the state that was kept. A QEMU that cannot load it
// ends by itself; one that cannot be given it is ended, as nothing of the guest
// is in it yet.
func (m Mover) pour(ctx context.Context, s Seat, id int, state []byte) error {
	ctx, cancel := context.WithTimeout(ctx, m.paced().load)
	defer cancel()
	err := m.misses(s)
	if err == nil {
		err = m.send(ctx, s, id, state)
	}
	if err != nil {
		return m.vacate(ctx, s, err)
	}
	for {
		now, err := runState(ctx, m.Host, s.UUID)
		if err != nil {
			return fmt.Errorf("the new QEMU did not take the state: %w", err)
		}
		if now != runIncoming {
			return nil
		}
		if !wait(ctx, pollEvery) {
			return errors.New("the new QEMU does not take the state")
		}
	}
}

// vacate ends a QEMU that could not be given the state, as nothing of the guest is in it yet.
func (m Mover) vacate(ctx context.Context, s Seat, why error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), m.paced().ask)
	defer cancel()
	return errors.Join(why, m.Host.QuitIncoming(ctx, s.UUID))
}

// send has the new QEMU listen, which is in the domain with that number, and sends it the state.
func (m Mover) send(ctx context.Context, s Seat, id int, state []byte) error {
	path, err := m.Places.socket(id, inSocket)
	if err != nil {
		return err
	}
	if err := setIgnoreShared(ctx, m.Host, s.UUID, true); err != nil {
		return err
	}
	// It is refused if a belayd that died has done it; then QEMU listens.
	refused := ask(ctx, m.Host, s.UUID, "migrate-incoming", map[string]any{"uri": "unix:" + path}, nil)
	if err := send(ctx, m.Places.at(path), state); err != nil {
		return errors.Join(refused, err)
	}
	_ = os.Remove(m.Places.at(path)) // QEMU does not always
	return nil
}

// misses says which of the guest's memory the new QEMU has not got.
func (m Mover) misses(s Seat) error {
	now, err := m.Places.qemu(s.Guest)
	if err != nil {
		return err
	}
	for _, path := range s.Memory {
		kept := filepath.Join(m.Places.at(s.Kept), filepath.Base(path))
		mapped, err := m.Places.maps(now.PID, kept)
		if err != nil {
			return err
		}
		if !mapped {
			return fmt.Errorf("the new QEMU has another file as its memory %s: libvirt did not run the hook", filepath.Base(path))
		}
	}
	return nil
}
