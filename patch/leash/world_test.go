package leash

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"belay/agent/maint"
)

// world is libvirt and the QEMUs of one host, in memory.
type world struct {
	mu     sync.Mutex
	guests map[string]*machine // by UUID
	// libvirt is how it answers: "" (well), "dead", "hung", "starting".
	libvirt string
	// thawed is closed when a hung libvirt goes on.
	thawed chan struct{}
}

// machine is a guest: what libvirt says of it, and what QEMU does.
type machine struct {
	uuid   string
	state  maint.GuestState
	reason string
	qemu   string // run state
	// leased: virtlockd holds its disks' leases. rival: somebody else does.
	leased, rival bool
	// gone: libvirt does not know it.
	gone bool
	// refuse is libvirt's answer to a resume, where it is an odd one.
	refuse error
	// stuck: a job of libvirt's does not end; calls that need one wait.
	stuck bool
	// onSuspend is called when it is stopped, on the way.
	onSuspend func()
	// onCont is called before QEMU starts it.
	onCont func()

	suspends, resumes, conts int
}

func newWorld(uuids ...string) *world {
	w := &world{guests: make(map[string]*machine)}
	for _, u := range uuids {
		w.guests[u] = &machine{uuid: u, state: maint.GuestRunning, reason: "booted", qemu: "running", leased: true}
	}
	return w
}

// set changes something about a guest.
func (w *world) set(uuid string, change func(*machine)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change(w.guests[uuid])
}

// get is a guest as it is now.
func (w *world) get(uuid string) machine {
	w.mu.Lock()
	defer w.mu.Unlock()
	return *w.guests[uuid]
}

// pause stops a guest's vCPUs, as virDomainSuspend does.
func (w *world) pause(uuid string) { w.set(uuid, (*machine).pause) }

func (m *machine) pause() {
	m.state, m.reason, m.qemu, m.leased = maint.GuestPaused, "user", "paused", false
}

func (m *machine) run() {
	m.state, m.reason, m.qemu, m.leased = maint.GuestRunning, "unpaused", "running", true
}

// become changes how libvirt answers. When it answers again after it was dead
// it has asked each QEMU.
func (w *world) become(libvirt string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.libvirt == "hung" {
		close(w.thawed)
	}
	if libvirt == "hung" {
		w.thawed = make(chan struct{})
	}
	w.libvirt = libvirt
	for _, m := range w.guests {
		if libvirt == "" && m.qemu == "running" && m.state == maint.GuestPaused {
			m.state, m.reason = maint.GuestRunning, "unpaused"
		}
	}
}

// call is a call to libvirt on a guest.
func (w *world) call(ctx context.Context, uuid string, f func(*machine) error) error {
	w.mu.Lock()
	how, thawed := w.libvirt, w.thawed
	w.mu.Unlock()
	switch how {
	case "dead":
		return fmt.Errorf("connection refused: %w", maint.ErrHypervisorDown)
	case "starting":
		return errors.New("libvirt has not caught up with the guest's QEMU")
	case "hung":
		select {
		case <-ctx.Done():
			return fmt.Errorf("no answer in time: %w", maint.ErrHypervisorDown)
		case <-thawed:
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	m := w.guests[uuid]
	if m == nil || m.gone {
		return fmt.Errorf("domain %s: %w", uuid, maint.ErrNoGuest)
	}
	return f(m)
}

func (w *world) State(ctx context.Context, uuid string) (s maint.GuestState, reason string, err error) {
	err = w.call(ctx, uuid, func(m *machine) error { s, reason = m.state, m.reason; return nil })
	return s, reason, err
}

func (w *world) Suspend(ctx context.Context, uuid string) error {
	return w.call(ctx, uuid, func(m *machine) error {
		m.suspends++
		m.pause()
		if m.onSuspend != nil {
			m.onSuspend()
		}
		return nil
	})
}

func (w *world) Resume(ctx context.Context, uuid string) error {
	if w.get(uuid).stuck {
		<-ctx.Done()
		return fmt.Errorf("no answer in time: %w", maint.ErrHypervisorDown)
	}
	return w.call(ctx, uuid, func(m *machine) error {
		m.resumes++
		switch {
		case m.refuse != nil:
			return m.refuse
		case m.rival:
			return fmt.Errorf("resource busy: %w", maint.ErrLocked)
		}
		m.run()
		return nil
	})
}

// dialMonitor is Config.Monitor: the path is "mon-" and the guest's UUID. It is
// libvirt's while that lives.
func (w *world) dialMonitor(ctx context.Context, path string) (Monitor, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.libvirt == "" || w.libvirt == "hung" {
		return nil, fmt.Errorf("no greeting: %w", ErrTaken)
	}
	m := w.guests[path[len("mon-"):]]
	if m == nil {
		return nil, errors.New("no such file")
	}
	return &fakeMonitor{w, m}, nil
}

type fakeMonitor struct {
	w *world
	m *machine
}

func (f *fakeMonitor) UUID(context.Context) (string, error) { return f.m.uuid, nil }

func (f *fakeMonitor) Status(context.Context) (string, error) {
	f.w.mu.Lock()
	defer f.w.mu.Unlock()
	return f.m.qemu, nil
}

func (f *fakeMonitor) Cont(context.Context) error {
	f.w.mu.Lock()
	defer f.w.mu.Unlock()
	if f.m.onCont != nil {
		f.m.onCont()
	}
	f.m.conts++
	f.m.qemu = "running"
	return nil
}

func (f *fakeMonitor) Close() error { return nil }
