package kexec

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"belay/agent/maint"
	"belay/patch/vmm"
)

// Boot has the host go down and come up with the new kernel. It does not return before the
// process ends, but when that has happened, or does not happen.
func (j *Job) Boot(ctx context.Context, s Scratch) error {
	pl, err := j.load(s)
	if err != nil {
		return err
	}
	boot, err := j.Tree.Boot()
	if err != nil {
		return err
	}
	if boot == pl.Boot {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if err := s.Save(moment{time.Now()}); err != nil {
			return err
		}
		return j.goDown(false)
	}
	switch now, err := j.Tree.Release(); {
	case err != nil:
		return err
	case now != pl.New.Release:
		return maint.Problemf(maint.CodeKernelOld, host, "see why (journalctl -b -1 -e, the console's log)",
			"has come up with kernel %s, not %s: the new one did not come up, or power was cut", now, pl.New.Release)
	}
	return nil
}

// moment is what Boot and Restore save: when they began.
type moment struct {
	At time.Time `json:"at"`
}

// allOff is an error if a guest would end with the host: one that was started since, or was
// restored by somebody who took the operation for dead.
func (j *Job) allOff() error {
	guests, err := j.Host.Guests(j.Life)
	if err != nil {
		return err
	}
	for _, g := range guests {
		if g.State.Active() {
			return maint.Problemf(maint.CodeStarted, "guest "+g.Name, "begin again", "runs, and would end with the kernel: it was started, or restored, meanwhile")
		}
	}
	return nil
}

// goDown has the host go down, and waits for that: an abort or a deadline is too late then,
// since a guest that is brought back would end with the host. blind: that libvirt is away, so
// that guests cannot be looked at, is what the host goes down for.
func (j *Job) goDown(blind bool) error {
	if j.Tree.OnPmem(j.Dir) == "" { // nobody restores a guest from there meanwhile
		unlock, err := j.lock(j.Life)
		if err != nil {
			return err
		}
		defer unlock()
	}
	going, err := j.Rebooter.Going(j.Life)
	var asked error
	if err == nil && !going {
		if err := j.allOff(); err != nil && !(blind && errors.Is(err, maint.ErrHypervisorDown)) {
			return err
		}
		if s, err := j.Tree.text(kexecLoaded); err != nil || s != "1" {
			return maint.Problemf(maint.CodeKexec, host, "see who unloads kernels here (kexec -u), and begin again",
				"has no other kernel loaded any more: it would go down by way of its firmware, which need not leave memory alone")
		}
		asked = j.Rebooter.Kexec(j.Life)
	}
	// It is asked once more when the time is up: this process may have stood still meanwhile.
	for seen := time.Now(); ; {
		going, err := j.Rebooter.Going(j.Life)
		if going || err != nil { // also systemd that does not answer is no sign that it stays up
			seen = time.Now()
		} else if time.Since(seen) >= j.Pace.Going {
			break
		}
		if !wait(j.Life, j.Pace.Poll) {
			return context.Cause(j.Life)
		}
	}
	why := cmp.Or(asked, err, errors.New("systemd has not begun to"))
	return maint.Problemf(maint.CodeKexec, host, "see 'systemctl status kexec.target' and systemctl list-jobs", "does not go down for another kernel: %v", why)
}

// checked is what Check saves before it has the old kernel started.
type checked struct {
	Boot string `json:"boot"` // of the kernel that was not well
	Sick string `json:"sick"`
}

// Check sees that the new kernel is well, before any guest is restored. If it is not, the old
// one is started as the new one was, and Check fails there: Back restores the guests then.
func (j *Job) Check(_ context.Context, s Scratch) error {
	pl, err := j.load(s)
	if err != nil {
		return err
	}
	boot, err := j.Tree.Boot()
	if err != nil {
		return err
	}
	var c checked
	if _, err := s.Load(PhaseCheck, &c); err != nil {
		return err
	}
	sick := func(more string) error {
		return maint.Problemf(maint.CodeKernelSick, "kernel "+pl.New.Release, "see its log (journalctl -k -b -1)", "is not well: %s%s", c.Sick, more)
	}
	switch {
	case c.Sick != "" && c.Boot != boot:
		now, _ := j.Tree.Release()
		return sick("; the host was started with " + now + " again")
	case c.Sick == "":
		err := j.healthy(pl)
		if err == nil {
			return nil
		}
		if j.Life.Err() != nil {
			return context.Cause(j.Life)
		}
		c = checked{Boot: boot, Sick: err.Error()}
		if pl.New.Release == pl.Old.Release {
			return sick("; it is the one as before")
		}
		if err := s.Save(c); err != nil {
			return err
		}
	}
	if err := s.Note("the new kernel is not well, so that the old one is started again: %s", c.Sick); err != nil {
		return err
	}
	if err := j.loadImage(j.Life, pl.Old); err != nil {
		return sick(fmt.Sprintf("; and the old one cannot be started: %v", err))
	}
	err = j.goDown(true)
	if j.Life.Err() != nil {
		return err
	}
	return sick(fmt.Sprintf("; and %v", err))
}

// healthy is nil if guests can be restored here.
func (j *Job) healthy(pl plan) error {
	limit, cancel := context.WithTimeout(j.Life, j.Pace.Healed)
	defer cancel()
	for {
		why := j.ready(limit, pl)
		if why == nil {
			break
		}
		if !wait(limit, j.Pace.Poll) {
			return why
		}
	}
	if j.Health != nil {
		return j.Health(j.Life)
	}
	return nil
}

// ready: the memory is there, libvirt answers, and its QEMU is the guests'. What comes late in
// a boot is waited for.
func (j *Job) ready(ctx context.Context, pl plan) error {
	if why := j.Tree.OnPmem(j.Dir); why != "" {
		return errors.New(why)
	}
	if slices.ContainsFunc(pl.Guests, func(g member) bool { return g.InPlace }) {
		folder, _ := j.Tree.backing()
		if _, why := j.Tree.within(j.Dir, folder); why != "" {
			return fmt.Errorf("libvirt cannot give guests their memory: %s", why)
		}
	}
	info, err := j.Host.Info(ctx)
	if err != nil {
		return fmt.Errorf("libvirt does not answer: %w", err)
	}
	for _, g := range pl.Guests {
		if !slices.Contains(info.MachineTypes, g.Machine) {
			return fmt.Errorf("QEMU %s has not the machine type %s of guest %s", info.QEMUVersion, g.Machine, g.Name)
		}
		if err := vmm.CanRun(ctx, j.Mover.Host, maint.Guest{Name: g.Name, DomainType: g.Domain, MachineType: g.Machine}, info.Arch, g.CPU); err != nil {
			return err
		}
	}
	return nil
}

// Restore restores every guest under the new kernel, and records how that went. What is wrong
// with single guests is Verify's to tell.
func (j *Job) Restore(_ context.Context, s Scratch) error {
	pl, err := j.load(s)
	if err != nil {
		return err
	}
	var down, begun moment
	_, err = s.Load(PhaseBoot, &down)
	again, err2 := s.Load(PhaseRestore, &begun)
	if err := errors.Join(err, err2); err != nil {
		return err
	}
	if !again {
		begun.At = time.Now()
		if err := s.Save(begun); err != nil {
			return err
		}
	}
	guests, err := j.bring(j.Life, &pl)
	if err != nil {
		return err
	}
	r := j.result(pl, guests)
	if up, err := j.Tree.Uptime(); err == nil {
		started := time.Now().Add(-up)
		r.Down, r.Up = max(started.Sub(down.At), 0), max(begun.At.Sub(started), 0) // the clocks of two boots
	}
	return j.Record(r)
}

// Verify tells what is not as it should be.
func (j *Job) Verify(r maint.KexecResult) error {
	problems := Problems(r.Guests)
	if r.BootAfter == r.BootBefore {
		problems = append(problems, *maint.Problemf(maint.CodeKexec, host, "see its log", "has the boot ID of before: it has not booted"))
	}
	return maint.Refuse("the host has another kernel, and not all is well", problems)
}

// Back is the way back: every guest that was saved is restored under the kernel that runs,
// and all is recorded. Guests that can be neither are an error.
func (j *Job) Back(_ context.Context, s Scratch) ([]maint.Problem, error) {
	pl, err := j.load(s)
	if err != nil {
		return nil, err
	}
	guests, err := j.bring(j.Life, &pl)
	if err != nil {
		return nil, err
	}
	if err := j.Record(j.result(pl, guests)); err != nil {
		return nil, err
	}
	problems := Problems(guests)
	if Kept(guests) {
		return nil, maint.Refuse("not every guest runs again", problems)
	}
	return problems, nil
}
