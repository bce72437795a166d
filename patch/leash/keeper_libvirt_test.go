package leash

import (
	"errors"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
)

// libvirt dies and stays dead: the monitor is the way. When it is back, the
// leases are taken again.
func TestLibvirtDead(t *testing.T) {
	within(t, newWorld(a, b), func(bed *bed) {
		bed.arm()
		bed.pause(a, b)
		bed.w.become("dead")
		bed.w.set(a, func(m *machine) {
			m.onCont = func() { // a leash that dies right after that has left word
				if !bed.notes().guest(a).Unleased {
					t.Error("it is not written down that the guest loses its leases")
				}
			}
		})
		bed.conn.Close()
		late := bed.runsWithin(3*time.Second+2*time.Second, a) - 3*time.Second
		t.Logf("released %s after the silence", late)
		if late > 1500*time.Millisecond {
			t.Errorf("released %s late", late)
		}
		bed.runsWithin(time.Second, b)
		if g := bed.fate(a, Released); !g.Unleased {
			t.Errorf("its leases are taken for held: %+v", g)
		}
		if n, e := bed.events(maint.LeashReleased, a); n != 1 || e.Way != "monitor" || e.Text == "" {
			t.Errorf("%d events, %+v", n, e)
		}

		// While that is open the leash does not end, by itself or by belayd.
		time.Sleep(5 * time.Minute)
		bed.connect()
		if p := bed.ask(request{Do: doDisarm}).Problem; p == nil || p.Code != maint.CodeBusy {
			t.Errorf("disarmed: %v", p)
		}
		for range 10 { // a libvirt that falls over again is not trusted
			bed.w.become("")
			time.Sleep(900 * time.Millisecond)
			bed.w.become("dead")
			time.Sleep(time.Second)
		}
		if m := bed.w.get(a); m.suspends > 0 {
			t.Errorf("it was stopped: %+v", m)
		}
		bed.w.become("")
		time.Sleep(4 * time.Second)
		for _, u := range []string{a, b} {
			if m := bed.w.get(u); !m.leased || m.qemu != "running" || m.suspends != 1 || m.conts != 1 {
				t.Errorf("after libvirt's return the guest is %+v", m)
			}
			if g := bed.fate(u, Released); g.Unleased {
				t.Errorf("its leases are taken for lost: %+v", g)
			}
		}
		if n, e := bed.events(maint.LeashReleased, a); n != 2 || e.Way != "libvirt" {
			t.Errorf("%d events, %+v", n, e)
		}
		bed.must(request{Do: doDisarm})
		bed.returned(time.Second)
	})
}

// A host step that just restarts libvirt is waited for: no lease is lost.
func TestLibvirtRestarts(t *testing.T) {
	within(t, newWorld(a), func(bed *bed) {
		bed.arm()
		bed.pause(a)
		bed.w.become("dead")
		time.Sleep(3800 * time.Millisecond)
		bed.w.become("")
		bed.runsWithin(300*time.Millisecond, a)
		if m := bed.w.get(a); m.conts > 0 || !m.leased {
			t.Errorf("it was released past libvirt: %+v", m)
		}
	})
}

// A libvirt that hangs has the monitor in its hand. The leash goes on trying,
// raises the alarm, and is there when it is over, whichever way.
func TestLibvirtHangs(t *testing.T) {
	for _, then := range []string{"", "dead"} {
		within(t, newWorld(a), func(bed *bed) {
			bed.arm()
			bed.pause(a)
			bed.w.become("hung")
			bed.staysFor(3*time.Minute, a)
			n, e := bed.events(maint.LeashFailed, a)
			if n == 0 || n > 10 || !strings.Contains(e.Text, "no answer in time") || !strings.Contains(e.Text, "no greeting") {
				t.Errorf("%d alarms, %+v", n, e)
			}
			bed.w.become(then)
			bed.runsWithin(retryMost+time.Second, a)
			if m := bed.w.get(a); m.leased != (then == "") {
				t.Errorf("then %q: %+v", then, m)
			}
		})
	}
}

// Where the order allows it a libvirt that hangs is killed, and its guests are
// released past it. Not before its time, not for any other reason, and not again
// and again.
func TestLibvirtIsKilled(t *testing.T) {
	within(t, newWorld(a, b), func(bed *bed) {
		o := bed.order()
		o.KillLibvirt = 5 * time.Second
		bed.must(request{Do: doArm, Order: o})
		bed.pause(a, b)
		bed.w.become("hung")
		bed.staysFor(3*time.Second+4900*time.Millisecond, a)
		if late := max(bed.runsWithin(4*time.Second, a), bed.runsWithin(4*time.Second, b)); bed.kills != 1 {
			t.Errorf("libvirt was killed %d times, guests ran %s later", bed.kills, late)
		}
		if n, e := bed.events(maint.LeashFailed, ""); n != 1 || !strings.Contains(e.Text, "was killed") {
			t.Errorf("%d events, %+v", n, e)
		}
	})
	within(t, newWorld(a), func(bed *bed) { // it may be beyond that, sleeping uninterruptibly
		bed.unkillable = errors.New("no such process")
		o := bed.order()
		o.KillLibvirt = 5 * time.Second
		bed.must(request{Do: doArm, Order: o})
		bed.pause(a)
		bed.w.become("hung")
		bed.staysFor(3*time.Second+70*time.Second, a)
		if n, e := bed.events(maint.LeashFailed, ""); bed.kills != n || n < 2 || n > 3 || !strings.Contains(e.Text, "no such process") {
			t.Errorf("tried %d times, %d events, %+v", bed.kills, n, e)
		}
		bed.w.become("")
		bed.runsWithin(2*retryMost, a)
	})
	within(t, newWorld(a, b), func(bed *bed) { // one that is alive and refuses is let be
		o := bed.order()
		o.KillLibvirt = minKill
		bed.must(request{Do: doArm, Order: o})
		bed.pause(a, b)
		bed.w.set(a, func(m *machine) { m.rival = true })
		bed.w.set(b, func(m *machine) { m.refuse = errors.New("virtlockd does not answer") })
		bed.staysFor(time.Minute, a)
		bed.w.set(b, func(m *machine) { m.stuck = true })
		bed.staysFor(2*time.Minute, b)
		bed.w.set(a, func(m *machine) { m.stuck = true })
		bed.staysFor(5*time.Minute, b)
		if bed.kills > 0 {
			t.Error("libvirt was killed")
		}
	})
}

// A libvirt that has just started has the monitors, or is about to.
func TestLibvirtStarts(t *testing.T) {
	within(t, newWorld(a), func(bed *bed) {
		bed.arm()
		bed.pause(a)
		bed.w.become("starting")
		bed.staysFor(time.Minute, a)
		bed.w.become("")
		bed.runsWithin(2*retryMost, a)
	})
}

// It may also not know a guest for a moment.
func TestGuestUnknownForAMoment(t *testing.T) {
	within(t, newWorld(a), func(bed *bed) {
		bed.arm()
		bed.pause(a)
		for range 10 {
			bed.w.set(a, func(m *machine) { m.gone = true; m.refuse = errors.New("not now") })
			time.Sleep(1800 * time.Millisecond)
			bed.w.set(a, func(m *machine) { m.gone = false })
			time.Sleep(2*retryMost + 100*time.Millisecond)
		}
		bed.fate(a, Paused)
		bed.w.set(a, func(m *machine) { m.refuse = nil })
		bed.runsWithin(2*retryMost, a)
	})
}

// A guest that belayd has paused and somebody has resumed is seen to at once.
func TestResumedBySomebody(t *testing.T) {
	within(t, newWorld(a), func(bed *bed) {
		bed.arm()
		bed.pause(a)
		bed.w.set(a, (*machine).run)
		time.Sleep(3300 * time.Millisecond)
		bed.fate(a, Released)
		if m := bed.w.get(a); m.resumes > 0 {
			t.Errorf("it was resumed: %+v", m)
		}
		if n, _ := bed.events(maint.LeashReleased, a); n > 0 {
			t.Error("the leash claims to have released it")
		}
		bed.must(request{Do: doDisarm})
	})
}

// A lease that is taken: never past libvirt, not even when that dies, not by a
// leash that comes after this one.
func TestLocked(t *testing.T) {
	within(t, newWorld(a), func(bed *bed) {
		bed.arm()
		bed.pause(a)
		bed.w.set(a, func(m *machine) { m.rival = true })
		bed.staysFor(10*time.Second, a)
		if n, e := bed.events(maint.LeashFailed, a); n == 0 || !strings.Contains(e.Text, "lease") {
			t.Errorf("%d alarms, %+v", n, e)
		}
		if !bed.fate(a, Paused).Locked {
			t.Error("it is not written down that a lease is taken")
		}
		bed.w.become("dead")
		bed.staysFor(time.Minute, a)
		bed.kill()
		bed.start()
		bed.staysFor(time.Minute, a)
		bed.w.become("")
		bed.staysFor(time.Minute, a)
		bed.w.set(a, func(m *machine) { m.rival = false })
		bed.runsWithin(2*retryMost, a)
		if m := bed.w.get(a); !m.leased || m.conts > 0 {
			t.Errorf("it is %+v", m)
		}
		bed.fate(a, Released)
	})
}

// An answer of libvirt's that is no refusal of a lease is none to go past it.
func TestLibvirtRefuses(t *testing.T) {
	within(t, newWorld(a), func(bed *bed) {
		bed.arm()
		bed.pause(a)
		bed.w.set(a, func(m *machine) { m.refuse = errors.New("virtlockd does not answer") })
		bed.staysFor(time.Minute, a)
		if n, e := bed.events(maint.LeashFailed, a); n == 0 || !strings.Contains(e.Text, "virtlockd") {
			t.Errorf("%d alarms, %+v", n, e)
		}
		bed.w.set(a, func(m *machine) { m.refuse = nil })
		bed.runsWithin(2*retryMost, a)
	})
}
