package leash

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
)

func TestArming(t *testing.T) {
	within(t, newWorld(a, b, c), func(bed *bed) {
		bed.w.pause(b) // by somebody else
		s := bed.arm()
		if g := s.guest(b); g.Fate != Left || !strings.Contains(g.Text, "paused (user)") {
			t.Errorf("a guest that was paused before is %+v", g)
		}
		if s.guest(a).Fate != Armed || s.guest(a).Monitor != "mon-"+a {
			t.Errorf("a guest that runs is %+v", s.guest(a))
		}
		// What was acknowledged is written down.
		if n := bed.notes(); n.Deadline != s.Deadline || len(n.Guests) != 3 || n.guest(b).Fate != Left {
			t.Errorf("the notes are %+v", n)
		}
		// Once more, by a holder that did not get the answer: nothing moves.
		again := bed.order()
		again.Deadline += time.Hour
		if s := bed.must(request{Do: doArm, Order: again}).Status; s.Deadline != bed.notes().Deadline || s.guest(b).Fate != Left {
			t.Errorf("armed again it is %+v", s)
		}
		// Whoever had paused it has resumed it, and Belay could pause it.
		bed.must(request{Do: doPaused, Guests: []string{b}})
		if g := bed.fate(b, Paused); g.Text != "" {
			t.Errorf("it is %+v", g)
		}
	})
}

func TestArmingIsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(b *bed, s *Status)
		want  maint.Code
	}{
		"libvirt is dead":       {func(b *bed, _ *Status) { b.w.become("dead") }, maint.CodeHypervisorDown},
		"libvirt hangs":         {func(b *bed, _ *Status) { b.w.become("hung") }, maint.CodeHypervisorDown},
		"a guest is not there":  {func(b *bed, _ *Status) { b.w.set(b2, func(m *machine) { m.gone = true }) }, maint.CodeUnknownGuest},
		"another's operation":   {func(_ *bed, s *Status) { s.Op = "hold-2" }, maint.CodeBadRequest},
		"another boot":          {func(_ *bed, s *Status) { s.Boot = "boot-0" }, maint.CodeBadRequest},
		"no guest":              {func(_ *bed, s *Status) { s.Guests = nil }, maint.CodeBadRequest},
		"a guest twice":         {func(_ *bed, s *Status) { s.Guests[1] = s.Guests[0] }, maint.CodeBadRequest},
		"a guest without UUID":  {func(_ *bed, s *Status) { s.Guests[1].UUID = "" }, maint.CodeBadRequest},
		"no fate":               {func(_ *bed, s *Status) { s.Guests[1].Fate = "lost" }, maint.CodeBadRequest},
		"an endless pause":      {func(_ *bed, s *Status) { s.Deadline += 25 * time.Hour }, maint.CodeBadRequest},
		"no silence":            {func(_ *bed, s *Status) { s.Silence = 0 }, maint.CodeBadRequest},
		"a kill before time":    {func(_ *bed, s *Status) { s.KillLibvirt = minKill - 1 }, maint.CodeBadRequest},
		"an endless silence":    {func(_ *bed, s *Status) { s.Silence = time.Hour }, maint.CodeBadRequest},
		"a folder that is none": {func(b *bed, _ *Status) { spoilDir(b.t, b.dir) }, maint.CodeInternal},
	} {
		t.Run(name, func(t *testing.T) {
			within(t, newWorld(a, b), func(bed *bed) {
				s := bed.order()
				c.spoil(bed, s)
				if p := bed.ask(request{Do: doArm, Order: s}).Problem; p == nil || p.Code != c.want {
					t.Fatalf("%v, want %s", p, c.want)
				}
				if _, err := readNotes(bed.dir, testOp); err == nil {
					t.Error("there are notes")
				}
				// It is as it was: nothing is held, and it does not stay for ever.
				if p := bed.ask(request{Do: doPaused, Guests: []string{a}}).Problem; p == nil || p.Code != maint.CodeNotFound {
					t.Errorf("a guest of a leash without order: %v", p)
				}
				bed.returned(2 * idleWait)
			})
		})
	}
}

const b2 = b

// spoilDir puts a file where the notes' folder is.
func spoilDir(t *testing.T, dir string) {
	err := errors.Join(os.RemoveAll(dir), os.WriteFile(dir, nil, 0o600))
	if err != nil {
		t.Fatal(err)
	}
}

func TestDeadline(t *testing.T) {
	within(t, newWorld(a, b, c), func(bed *bed) {
		bed.w.pause(c)
		bed.arm()
		bed.pause(a, b)
		bed.renewFor(59 * time.Second)
		if bed.w.get(a).resumes > 0 {
			t.Fatal("it fired early")
		}
		time.Sleep(time.Second - 10*time.Millisecond)
		if bed.w.get(a).resumes > 0 {
			t.Fatal("it fired early")
		}
		late := max(bed.runsWithin(time.Second, a), bed.runsWithin(time.Second, b))
		if late > 200*time.Millisecond {
			t.Errorf("released %s late", late)
		}
		bed.fate(a, Released)
		bed.fate(b, Released)
		if n, e := bed.events(maint.LeashReleased, a); n != 1 || e.Way != "libvirt" || e.Guest != "guest-a" {
			t.Errorf("%d events, %+v", n, e)
		}
		if n, e := bed.events(maint.LeashFired, ""); n != 1 || e.Text == "" {
			t.Errorf("%d events, %+v", n, e)
		}
		if n, e := bed.events(maint.LeashRenewed, ""); n != 1 || e.Count != 59 {
			t.Errorf("%d events of renewals, %+v", n, e)
		}
		if m := bed.w.get(a); m.conts > 0 || m.suspends > 0 || m.resumes != 1 {
			t.Errorf("more was done than needed: %+v", m)
		}
		// The holder is told at its next word.
		if r := bed.ask(request{Do: doRenew}); r.Fired == "" {
			t.Error("the holder is not told that it has fired")
		}
		// c was paused by somebody else and stays so.
		bed.staysFor(5*time.Second, c)
		if m := bed.w.get(c); m.resumes > 0 {
			t.Errorf("somebody else's guest was touched: %+v", m)
		}
		events := bed.must(request{Do: doDisarm}).Status.Events
		if last := events[len(events)-1]; last.Kind != maint.LeashDisarmed {
			t.Errorf("the last event is %+v", last)
		}
		bed.returned(time.Second)
		bed.noNotes()
	})
}

func TestSilence(t *testing.T) {
	within(t, newWorld(a, b), func(bed *bed) {
		bed.arm()
		bed.pause(a, b)
		bed.renewFor(10 * time.Second)
		bed.conn.Close() // belayd is dead; that alone is no reason: it may come back
		time.Sleep(2900 * time.Millisecond)
		if bed.w.get(a).resumes > 0 {
			t.Fatal("it fired early")
		}
		bed.runsWithin(300*time.Millisecond, a)
		bed.runsWithin(300*time.Millisecond, b)
		if _, e := bed.events(maint.LeashFired, ""); !strings.Contains(e.Text, "nothing was heard from belayd for 3") {
			t.Errorf("it fired for %q", e.Text)
		}
	})
}

// What is no word of belayd does not keep the leash from firing.
func TestGarbageIsNoWord(t *testing.T) {
	within(t, newWorld(a), func(bed *bed) {
		bed.arm()
		bed.pause(a)
		for range 40 {
			time.Sleep(100 * time.Millisecond)
			if p := bed.ask(request{Do: "renwe"}).Problem; p == nil || p.Code != maint.CodeBadRequest {
				t.Fatalf("an unknown request: %v", p)
			}
		}
		bed.runsWithin(0, a)
	})
}

// A leash that was itself held up takes that for no silence of belayd's.
func TestHeldUp(t *testing.T) {
	within(t, newWorld(a), func(bed *bed) {
		bed.arm()
		bed.pause(a)
		bed.renewFor(5 * time.Second)
		bed.asleep.Add(int64(20 * time.Second)) // the clock runs, the leash does not
		bed.renewFor(5 * time.Second)
		if m := bed.w.get(a); m.resumes > 0 {
			t.Fatal("it fired")
		}
		// But the deadline has come nearer by as much.
		left := bed.notes().Deadline - bed.clock()
		if left > 31*time.Second {
			t.Errorf("%s are left", left)
		}
		bed.asleep.Add(int64(left))
		bed.runsWithin(200*time.Millisecond, a)
	})
}

// Guests in states that are not of Belay's making are not touched.
func TestNotOurs(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*machine)
		dead   bool // libvirt is
		fate   Fate
	}{
		"an I/O error":              {func(m *machine) { m.reason, m.qemu = "I/O error", "io-error" }, false, Left},
		"an I/O error, dead":        {func(m *machine) { m.reason, m.qemu = "I/O error", "io-error" }, true, Paused},
		"being migrated":            {func(m *machine) { m.reason, m.qemu = "migrating", "postmigrate" }, false, Left},
		"was migrated, dead":        {func(m *machine) { m.qemu = "postmigrate" }, true, Paused},
		"crashed":                   {func(m *machine) { m.state, m.qemu = maint.GuestCrashed, "guest-panicked" }, false, Left},
		"asleep":                    {func(m *machine) { m.state, m.qemu = maint.GuestSuspended, "suspended" }, false, Left},
		"shut off":                  {func(m *machine) { m.state, m.reason, m.qemu = maint.GuestShutoff, "destroyed", "" }, false, Left},
		"gone":                      {func(m *machine) { m.gone, m.qemu = true, "" }, false, Left},
		"another guest's monitor":   {func(m *machine) { m.uuid = b }, true, Paused},
		"a QEMU that is not there":  {func(m *machine) { m.qemu = "" }, true, Paused},
		"libvirt says saved anyway": {func(m *machine) { m.reason = "saving" }, false, Left},
	} {
		t.Run(name, func(t *testing.T) {
			within(t, newWorld(a), func(bed *bed) {
				bed.arm()
				bed.pause(a)
				bed.w.set(a, c.change)
				if c.dead {
					bed.w.become("dead")
				}
				bed.staysFor(20*time.Second, a)
				if m := bed.w.get(a); m.resumes > 0 || m.suspends > 0 {
					t.Errorf("it was touched: %+v", m)
				}
				bed.fate(a, c.fate)
				if n, e := bed.events(maint.LeashFailed, a); n == 0 {
					t.Errorf("%d alarms, %+v", n, e)
				}
			})
		})
	}
}

// belayd dies between its call to libvirt and its word to the leash.
func TestPausedWithoutAWord(t *testing.T) {
	within(t, newWorld(a, b, c), func(bed *bed) {
		bed.arm()
		bed.w.pause(a)
		time.Sleep(4 * time.Second) // b's call is slower than the leash
		bed.w.pause(b)
		bed.runsWithin(0, a)
		bed.runsWithin(2*time.Second, b)
		time.Sleep(2 * settle)
		if m := bed.w.get(c); m.resumes > 0 {
			t.Errorf("a guest that runs was resumed: %+v", m)
		}
		bed.fate(c, Released)
		// Who pauses it now is somebody else.
		bed.w.pause(c)
		bed.staysFor(30*time.Second, c)
	})
}

// A guest that was told to be left, or released, is not touched when it is found
// paused afterwards.
func TestLeftAndReleased(t *testing.T) {
	within(t, newWorld(a, b, c), func(bed *bed) {
		bed.arm()
		bed.pause(a, b)
		bed.w.set(b, (*machine).run)
		bed.must(request{Do: doReleased, Guests: []string{b}})
		bed.must(request{Do: doLeft, Guests: []string{c}})
		bed.w.pause(b)
		bed.w.pause(c)
		bed.runsWithin(4*time.Second, a)
		bed.staysFor(20*time.Second, b)
		bed.staysFor(0, c)
		if g := bed.fate(b, Released); g.Text != "by belayd" {
			t.Errorf("%+v", g)
		}
		bed.fate(c, Left)
	})
}

// All or nothing: a word with a guest that is not in the order changes none.
func TestUnknownGuest(t *testing.T) {
	within(t, newWorld(a), func(bed *bed) {
		bed.arm()
		for _, guests := range [][]string{{a, b}, {}, {""}} {
			if p := bed.ask(request{Do: doReleased, Guests: guests}).Problem; p == nil || p.Code != maint.CodeBadRequest {
				t.Errorf("%q: %v", guests, p)
			}
		}
		bed.fate(a, Armed)
	})
}

// A holder that had not heard of it stops a guest after the leash has fired.
func TestPausedAfterFiring(t *testing.T) {
	within(t, newWorld(a, b), func(bed *bed) {
		bed.arm()
		time.Sleep(20 * time.Second) // belayd stood still
		bed.w.pause(a)
		if r := bed.must(request{Do: doPaused, Guests: []string{a}}); r.Fired == "" {
			t.Error("the holder is not told that it has fired")
		}
		bed.runsWithin(200*time.Millisecond, a)
		bed.fate(a, Released)
	})
}

// A hold that ended as it should fires for nobody when belayd is not heard of
// again.
func TestNobodyHeld(t *testing.T) {
	within(t, newWorld(a), func(bed *bed) {
		bed.arm()
		bed.pause(a)
		bed.w.set(a, (*machine).run)
		bed.must(request{Do: doReleased, Guests: []string{a}})
		time.Sleep(10 * time.Second)
		if n, _ := bed.events(maint.LeashFired, ""); n != 0 {
			t.Error("an alarm for nothing")
		}
		bed.returned(2 * time.Minute)
		// What it has done is there for the next belayd.
		if s := bed.notes(); s.Fired == "" || len(s.Events) == 0 {
			t.Errorf("the notes are %+v", s)
		}
	})
}

func TestDisarm(t *testing.T) {
	within(t, newWorld(a, b), func(bed *bed) {
		if p := bed.ask(request{Do: doDisarm}).Problem; p == nil || p.Code != maint.CodeNotFound {
			t.Errorf("disarmed before it was armed: %v", p)
		}
		bed.arm()
		bed.pause(a)
		if p := bed.ask(request{Do: doDisarm}).Problem; p == nil || p.Code != maint.CodeGuestPaused {
			t.Errorf("disarmed with a guest paused: %v", p)
		}
		bed.w.set(a, (*machine).run)
		bed.must(request{Do: doReleased, Guests: []string{a}})
		bed.must(request{Do: doDisarm})
		bed.noNotes() // at once: a leash that is started again finds nothing
		bed.returned(time.Second)
	})
}

// A holder that is slow to read gets its answer, however long it has held.
func TestDisarmIsAnswered(t *testing.T) {
	within(t, newWorld(a), func(bed *bed) {
		bed.arm()
		bed.renewFor(idleWait + 5*time.Second)
		if _, err := bed.conn.Write(encode(request{ID: 999, Do: doDisarm})); err != nil {
			t.Fatal(err)
		}
		time.Sleep(replyTimeout / 2)
		var r reply
		if err := bed.in.next(&r); err != nil || r.Problem != nil || r.Status == nil {
			t.Fatalf("%+v, %v", r, err)
		}
		bed.returned(time.Second)
	})
}

// SIGTERM, of a host that shuts down for one: release, then end.
func TestTold(t *testing.T) {
	within(t, newWorld(a), func(bed *bed) {
		bed.arm()
		bed.pause(a)
		bed.stop()
		bed.runsWithin(200*time.Millisecond, a)
		bed.returned(time.Second)
		if _, e := bed.events(maint.LeashFired, ""); e.Text != "the leash was told to end" {
			t.Errorf("it fired for %q", e.Text)
		}
	})
	within(t, newWorld(a), func(bed *bed) { // with libvirt gone already
		bed.arm()
		bed.pause(a)
		bed.w.become("dead")
		bed.stop()
		bed.runsWithin(2*time.Second, a)
		bed.returned(2 * time.Second)
		if g := bed.fate(a, Released); !g.Unleased {
			t.Errorf("%+v", g)
		}
	})
	within(t, newWorld(a), func(bed *bed) { // and without an order
		bed.stop()
		bed.returned(time.Second)
	})
}

func TestNeverArmed(t *testing.T) {
	within(t, newWorld(a), func(bed *bed) {
		time.Sleep(idleWait - time.Second)
		select {
		case <-bed.ended:
			t.Fatal("it did not wait for its order")
		default:
		}
		bed.returned(2 * time.Second)
	})
}
