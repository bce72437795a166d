package leash

import (
	"errors"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"belay/agent/maint"
)

// A leash that is started again goes on with the same deadline and the same
// knowledge.
func TestRestart(t *testing.T) {
	within(t, newWorld(a, b, c), func(bed *bed) {
		bed.w.pause(c)
		before := bed.arm()
		bed.pause(a)
		bed.renewFor(20 * time.Second)
		bed.kill()
		time.Sleep(10 * time.Second)
		if bed.w.get(a).resumes > 0 {
			t.Fatal("a dead leash has fired")
		}
		bed.start()
		if s := bed.must(request{Do: doStatus}).Status; s.Deadline != before.Deadline || s.guest(a).Fate != Paused || s.guest(c).Fate != Left {
			t.Errorf("it goes on with %+v", s)
		}
		bed.renewFor(29 * time.Second)
		if bed.w.get(a).resumes > 0 {
			t.Fatal("it fired early")
		}
		bed.runsWithin(1200*time.Millisecond, a)
		bed.staysFor(5*time.Second, c)
	})
	// The deadline has passed while no leash lived.
	within(t, newWorld(a), func(bed *bed) {
		bed.arm()
		bed.pause(a)
		bed.kill()
		time.Sleep(2 * time.Minute)
		bed.start()
		bed.runsWithin(200*time.Millisecond, a)
	})
	// It died in the middle of a release.
	within(t, newWorld(a), func(bed *bed) {
		bed.arm()
		bed.pause(a)
		bed.w.become("hung")
		time.Sleep(10 * time.Second)
		bed.kill()
		bed.w.become("")
		bed.start()
		bed.runsWithin(200*time.Millisecond, a)
	})
}

// Notes of an earlier boot are void: these guests are others.
func TestAnotherBoot(t *testing.T) {
	within(t, newWorld(a), func(bed *bed) {
		bed.arm()
		bed.pause(a)
		bed.kill()
		bed.boot = "boot-2"
		bed.start()
		bed.staysFor(2*time.Minute, a)
		bed.returned(time.Second)
	})
}

// Damaged notes are as good as none: its holder tells the leash again, with
// what was paused, and nobody asks libvirt, which may be what is serviced.
func TestWithoutNotes(t *testing.T) {
	for name, spoil := range map[string]func(file string) error{
		"removed": os.Remove,
		"damaged": func(file string) error { return os.WriteFile(file, []byte(`{"op":"hold`), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			within(t, newWorld(a, b), func(bed *bed) {
				known := bed.arm()
				bed.pause(a)
				bed.w.pause(b) // belayd knows, the leash does not yet
				bed.kill()
				if err := spoil(path(bed.dir, testOp, notesExt)); err != nil {
					t.Fatal(err)
				}
				bed.w.become("dead")
				bed.start()
				known.guest(a).Fate = Paused
				s := bed.must(request{Do: doTake, Order: known}).Status
				if s.Deadline != known.Deadline || s.guest(a).Fate != Paused || s.guest(b).Fate != Armed {
					t.Errorf("it goes on with %+v", s)
				}
				bed.runsWithin(5*time.Second, a)
				bed.runsWithin(time.Second, b)
			})
		})
	}
}

// What a holder knows and what the leash knows come together.
func TestTake(t *testing.T) {
	within(t, newWorld(a, b, c), func(bed *bed) {
		known := bed.arm()
		bed.pause(a, b)
		known.guest(a).Fate = Released // not told yet
		known.guest(b).Fate = Armed    // a holder that has forgotten
		known.guest(c).Fate = Paused   // not told yet
		bed.w.set(a, (*machine).run)
		bed.w.pause(c)
		bed.conn.Close()
		bed.connect()
		s := bed.must(request{Do: doTake, Order: known}).Status
		if s.guest(a).Fate != Released || s.guest(b).Fate != Paused || s.guest(c).Fate != Paused {
			t.Errorf("together they know %+v", s.Guests)
		}
		other := bed.order()
		other.Guests[0].UUID = "dddddddd-0000-0000-0000-000000000000"
		if p := bed.ask(request{Do: doTake, Order: other}).Problem; p == nil || p.Code != maint.CodeBadRequest {
			t.Errorf("another's order: %v", p)
		}
		bed.runsWithin(4*time.Second, b)
		bed.runsWithin(time.Second, c)
	})
}

// The folder is removed under a living leash.
func TestFolderRemoved(t *testing.T) {
	within(t, newWorld(a), func(bed *bed) {
		bed.arm()
		if err := os.RemoveAll(bed.dir); err != nil {
			t.Fatal(err)
		}
		bed.pause(a)
		bed.fate(a, Paused)
		bed.runsWithin(4*time.Second, a)
		bed.fate(a, Released)
	})
}

// Somebody has taken the disk of a guest that was released past libvirt: when
// its leases are to be taken again, it stays stopped.
func TestRivalWhileUnleased(t *testing.T) {
	within(t, newWorld(a), func(bed *bed) {
		bed.arm()
		bed.pause(a)
		bed.w.become("dead")
		bed.runsWithin(5*time.Second, a)
		bed.w.set(a, func(m *machine) { m.rival, m.conts = true, 0 })
		bed.w.become("")
		time.Sleep(4 * time.Second)
		bed.staysFor(time.Minute, a)
		bed.w.become("dead")
		bed.staysFor(time.Minute, a)
		if n, e := bed.events(maint.LeashFailed, a); n == 0 || !bed.fate(a, Armed).Locked {
			t.Errorf("%d alarms, %+v", n, e)
		}
		bed.w.become("")
		bed.w.set(a, func(m *machine) { m.rival = false })
		bed.runsWithin(2*retryMost, a)
	})
}

// The leash dies while it has a guest stopped to take its leases: the next one
// resumes it.
func TestDiesInRelock(t *testing.T) {
	within(t, newWorld(a), func(bed *bed) {
		bed.arm()
		bed.pause(a)
		bed.w.become("dead")
		bed.runsWithin(5*time.Second, a)
		stopped := make(chan bool, 1)
		bed.w.set(a, func(m *machine) {
			m.refuse = errors.New("not now") // so that it stays stopped
			m.onSuspend = func() { stopped <- true }
		})
		bed.w.become("")
		<-stopped
		bed.kill()
		if m := bed.w.get(a); m.qemu != "paused" {
			t.Fatalf("it is %+v", m)
		}
		bed.w.set(a, func(m *machine) { m.refuse = nil })
		bed.start()
		bed.runsWithin(time.Second, a)
		time.Sleep(10 * time.Second)
		if g := bed.fate(a, Released); g.Unleased || !bed.w.get(a).leased {
			t.Errorf("%+v, %+v", g, bed.w.get(a))
		}
	})
}

// A guest that somebody stops before its leases are taken again is theirs.
func TestStoppedWhileUnleased(t *testing.T) {
	within(t, newWorld(a), func(bed *bed) {
		bed.arm()
		bed.pause(a)
		bed.w.become("dead")
		bed.runsWithin(5*time.Second, a)
		bed.w.become("")
		bed.w.set(a, func(m *machine) { m.pause(); m.conts = 0 })
		bed.staysFor(30*time.Second, a)
		if m := bed.w.get(a); m.suspends > 0 || m.resumes > 0 {
			t.Errorf("it was touched: %+v", m)
		}
	})
}

// One guest in trouble does not hold up another.
func TestEachByItself(t *testing.T) {
	within(t, newWorld(a, b, c), func(bed *bed) {
		bed.arm()
		bed.pause(a, b, c)
		bed.w.set(a, func(m *machine) { m.rival = true })
		bed.w.set(b, func(m *machine) { m.reason = "I/O error" })
		bed.runsWithin(3200*time.Millisecond, c)
		synctest.Wait()
		bed.fate(b, Left)
		bed.staysFor(time.Second, a)
	})
}
