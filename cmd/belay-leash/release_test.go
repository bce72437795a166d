package main

import (
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/vmtests/lab"
)

// quick is how long after a deadline, or a silence, guests may stand still.
const quick = 5 * time.Second

// TestLeash has the leash release real guests, whatever dies. In all of it the
// guest that somebody else has paused stays paused.
func TestLeash(t *testing.T) {
	s := newSite(t)
	for _, c := range []struct {
		name string
		test func(*testing.T, *site)
	}{
		{"belayd is killed", belaydIsKilled},
		{"belayd is killed before a word", belaydIsKilledEarly},
		{"belayd does not release in time", belaydIsSlow},
		{"belayd and the leash are killed", bothAreKilled},
		{"libvirtd is killed", libvirtdIsKilled},
		{"libvirtd is killed and comes back", libvirtdComesBack},
		{"libvirtd hangs", libvirtdHangs},
		{"libvirtd hangs and is killed", libvirtdHangsAndIsKilled},
		{"libvirtd hangs and may be killed", libvirtdMayBeKilled},
		{"a lease is taken", leaseIsTaken},
		{"a lease is taken without libvirtd", leaseIsTakenWithoutLibvirtd},
	} {
		t.Run(c.name, func(t *testing.T) {
			of := *s
			of.t = t
			c.test(t, &of)
			s.ops = of.ops
			if !t.Failed() {
				of.is("web", maint.GuestRunning)
				of.is("db", maint.GuestRunning)
				if !of.leased() {
					t.Error("db runs without the lease of its disk")
				}
			}
		})
	}
}

func belaydIsKilled(t *testing.T, s *site) {
	o := s.order(time.Minute)
	holder := s.holder(o, false)
	time.Sleep(2 * o.Silence)
	s.is("web", maint.GuestPaused) // while belayd lives
	must(t, holder.Process.Kill())
	took := s.run("web", "db")
	t.Logf("released %s after belayd's death, with a silence of %s", took, o.Silence)
	if took > o.Silence+quick {
		t.Error("that is too late")
	}
	events := s.end(o.Op)
	for _, name := range []string{"web", "db"} {
		if !has(events, maint.LeashReleased, name, "libvirt") {
			t.Errorf("%s was not released by libvirt: %+v", name, events)
		}
	}
}

func belaydIsKilledEarly(t *testing.T, s *site) {
	o := s.order(time.Minute)
	must(t, s.holder(o, true).Process.Kill())
	if took := s.run("web", "db"); took > o.Silence+quick {
		t.Errorf("released %s after belayd's death", took)
	}
	s.end(o.Op)
}

func belaydIsSlow(t *testing.T, s *site) {
	o := s.order(4 * time.Second)
	begun := time.Now()
	holder := s.holder(o, false) // which renews, and does nothing else
	s.run("web", "db")
	took := time.Since(begun)
	must(t, holder.Process.Kill())
	t.Logf("released %s after the order, of %s", took, o.MaxPause)
	if took < o.MaxPause || took > o.MaxPause+quick {
		t.Error("that is not in time")
	}
	s.end(o.Op)
}

func bothAreKilled(t *testing.T, s *site) {
	o := s.order(time.Minute)
	holder := s.holder(o, false)
	pid := s.leash(o.Op)
	must(t, holder.Process.Signal(syscall.SIGSTOP)) // or it would have another
	must(t, syscall.Kill(pid, syscall.SIGKILL))
	must(t, holder.Process.Kill())
	time.Sleep(o.Silence)
	s.is("web", maint.GuestPaused)
	begun := time.Now()
	_, err := s.client.Launcher.Launch(t.Context(), o.Op) // as systemd does
	must(t, err)
	s.run("web", "db")
	if took := time.Since(begun); took > o.Silence+quick {
		t.Errorf("released %s after the leash was started again", took)
	}
	s.end(o.Op)
}

func libvirtdIsKilled(t *testing.T, s *site) {
	o := s.order(time.Minute)
	holder := s.holder(o, false)
	s.signal(lab.Libvirtd, unix.SIGKILL) // and stays dead
	must(t, holder.Process.Kill())
	took := s.runPastLibvirt("web", "db")
	t.Logf("released %s after belayd's and libvirtd's death, with a silence of %s", took, o.Silence)
	if took > o.Silence+quick {
		t.Error("that is too late")
	}
	if s.leased() {
		t.Error("a lease is held: there is nothing to be taken again")
	}
	must(t, s.StartDaemon(t.Context(), lab.Libvirtd))
	events := s.end(o.Op) // waits for the leases
	for _, name := range []string{"web", "db"} {
		if !has(events, maint.LeashReleased, name, "monitor") || !has(events, maint.LeashReleased, name, "libvirt") {
			t.Errorf("%s was not released by its monitor, or not leased again: %+v", name, events)
		}
	}
}

// A host step that restarts libvirtd must not cost the leases.
func libvirtdComesBack(t *testing.T, s *site) {
	o := s.order(time.Minute)
	holder := s.holder(o, false)
	must(t, holder.Process.Kill())
	s.signal(lab.Libvirtd, unix.SIGKILL)
	must(t, s.StartDaemon(t.Context(), lab.Libvirtd))
	took := s.run("web", "db")
	events := s.end(o.Op)
	t.Logf("released %s after libvirtd's return", took)
	if took > o.Silence+quick {
		t.Errorf("released %s after libvirtd's return: %+v", took, events)
	}
}

func libvirtdHangs(t *testing.T, s *site) {
	o := s.order(time.Minute)
	holder := s.holder(o, false)
	s.signal(lab.Libvirtd, unix.SIGSTOP)
	must(t, holder.Process.Kill())
	s.failing(o.Op, "web")
	s.signal(lab.Libvirtd, unix.SIGCONT)
	took := s.run("web", "db")
	t.Logf("released %s after libvirtd goes on", took)
	if took > 2*quick {
		t.Error("that is too late")
	}
	s.end(o.Op)
}

func libvirtdHangsAndIsKilled(t *testing.T, s *site) {
	o := s.order(time.Minute)
	holder := s.holder(o, false)
	s.signal(lab.Libvirtd, unix.SIGSTOP)
	must(t, holder.Process.Kill())
	s.failing(o.Op, "web")
	s.signal(lab.Libvirtd, unix.SIGKILL)
	took := s.runPastLibvirt("web", "db")
	t.Logf("released %s after libvirtd's end", took)
	if took > 2*quick {
		t.Error("that is too late")
	}
	must(t, s.StartDaemon(t.Context(), lab.Libvirtd))
	s.end(o.Op)
}

func libvirtdMayBeKilled(t *testing.T, s *site) {
	o := s.order(time.Minute)
	o.KillLibvirt = 3 * time.Second
	holder := s.holder(o, false)
	s.signal(lab.Libvirtd, unix.SIGSTOP)
	must(t, holder.Process.Kill())
	took := s.runPastLibvirt("web", "db")
	t.Logf("released %s after libvirtd began to hang, with a silence of %s and %s for libvirtd", took, o.Silence, o.KillLibvirt)
	if took > o.Silence+o.KillLibvirt+2*quick {
		t.Error("that is too late")
	}
	must(t, s.StartDaemon(t.Context(), lab.Libvirtd))
	s.end(o.Op)
}

// failing waits until the leash has raised the alarm for a guest.
func (s *site) failing(op maint.OpID, guest string) {
	s.t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		all, err := leftovers(s.client.Dir)
		must(s.t, err)
		if slices.ContainsFunc(all[op], func(e maint.LeashEvent) bool { return e.Kind == maint.LeashFailed && e.Guest == guest }) {
			return
		}
		if time.Now().After(end) {
			s.t.Fatalf("no alarm for guest %s: %+v", guest, all[op])
		}
	}
}

func leaseIsTaken(t *testing.T, s *site) {
	o := s.order(time.Minute)
	holder := s.holder(o, false)
	free := s.takeLease()
	must(t, holder.Process.Kill())
	s.run("web") // is not held up by db
	s.failing(o.Op, "db")
	// Not past libvirt either, when there is none.
	s.signal(lab.Libvirtd, unix.SIGKILL)
	time.Sleep(5 * time.Second)
	must(t, s.StartDaemon(t.Context(), lab.Libvirtd))
	s.is("db", maint.GuestPaused)
	free()
	if took := s.run("db"); took > 2*quick {
		t.Errorf("released %s after the lease was free", took)
	}
	s.end(o.Op)
}

// While a guest runs past libvirt somebody takes its disk.
func leaseIsTakenWithoutLibvirtd(t *testing.T, s *site) {
	o := s.order(time.Minute)
	holder := s.holder(o, false)
	s.signal(lab.Libvirtd, unix.SIGKILL)
	must(t, holder.Process.Kill())
	s.runPastLibvirt("web", "db")
	free := s.takeLease()
	must(t, s.StartDaemon(t.Context(), lab.Libvirtd))
	s.failing(o.Op, "db")
	s.is("db", maint.GuestPaused) // two writers would destroy its disk
	free()
	if took := s.run("db"); took > 2*quick {
		t.Errorf("released %s after the lease was free", took)
	}
	s.end(o.Op)
}
