package migrate

import (
	"testing"

	"pgregory.net/rapid"

	"belay/agent/maint"
)

// model is two hosts, one guest and libvirt's peer-to-peer migration of it, as far as who
// runs the guest is concerned: what libvirt does by itself, step by step, and what it
// leaves when something dies. See Reconcile for what is done about that.
//
//	none -> copying -> performed -> finishing -> started -> confirmed
//	           '-----> post-copy (source stopped, destination started) -> confirmed
//
// In "performed" the source is stopped and the destination does not know yet that it is to
// start; in "started" it runs and the source has not heard of it.
type model struct {
	call       string // what libvirt's call is at; "" none
	here       half   // the guest on the source
	there      half   // and on the destination
	hereUp     bool   // libvirtd
	thereUp    bool
	lan        bool
	parted     bool // QEMUs in post-copy have lost each other
	persistent bool
	postCopies bool // this one is to go on as post-copy

	watched  bool // the destination's belayd has not lost sight of its guests since the copy began
	noted    bool // and has seen it run
	wasBlind bool // has lost sight of it, ever
	keptOff  bool // its autostart, for the copy
	rebooted bool // the source, since
	third    bool // another host runs it: somebody has moved it on by hand

	begun   int  // copies
	over    bool // libvirt has said that the latest failed
	told    bool // to go on as post-copy
	seen    bool // to have moved
	alarmed bool // a person was asked

	ran  bool // on the destination: what the source has is out of date
	flaw bool // libvirt's own: the answer of a destination that has started it was lost
	lost bool // with a QEMU; nobody can help that
	off  bool // its owner's doing
}

// half is the guest on one host. A process is one of: running, stopped (by the migration),
// incoming, post (stopped on the source, running on the destination).
type half struct {
	process string
	defined bool
	reason  string // why it runs or not, in libvirt's words
}

// view is what a host's libvirt tells.
func (m *model) view(h half, source bool) *maint.View {
	up := m.thereUp
	if source {
		up = m.hereUp
	}
	if !up || !source && !m.lan { // the peer's belayd is asked by the same LAN
		return nil
	}
	job := ""
	if m.call != "" || h.process == "post" {
		job = map[bool]string{true: jobOut, false: jobIn}[source]
	}
	switch h.process {
	case "running":
		if !source {
			job = ""
		}
		return seen(maint.GuestRunning, h.reason, job)
	case "stopped", "incoming":
		return seen(maint.GuestPaused, reasonMigrating, job)
	case "post":
		state := map[bool]maint.GuestState{true: maint.GuestPaused, false: maint.GuestRunning}[source]
		return seen(state, h.reason, job)
	}
	if h.defined {
		return seen(maint.GuestShutoff, "unknown", "")
	}
	return &maint.View{}
}

// ranThere is the destination's having started it.
func (m *model) ranThere() { m.ran, m.noted = true, m.noted || m.watched }

// blind is what the destination's belayd, or its connection to libvirt, leaves that dies.
func (m *model) blind() { m.watched, m.noted, m.wasBlind = false, false, true }

func (m *model) runs() (n int) {
	if m.third {
		n++
	}
	if m.here.process == "running" {
		n++
	}
	if m.there.process == "running" || m.there.process == "post" {
		n++
	}
	return n
}

func (m *model) post() bool { return m.here.process == "post" || m.there.process == "post" }

// fail is the end of libvirt's call on the source, which lives: the guest goes on there.
func (m *model) fail() {
	if m.post() {
		m.call, m.here.reason = "", reasonPostCopyFailed
		return
	}
	m.flaw = m.flaw || m.call == "started"
	m.call, m.over = "", true
	if m.here.process == "stopped" {
		m.here.process, m.here.reason = "running", reasonResumed
	}
}

// step is libvirt's call going on.
func (m *model) step() {
	if !m.hereUp || m.call == "" || !m.lan && m.call != "copying" || !m.thereUp && m.call != "copying" {
		return
	}
	switch m.call {
	case "copying":
		if m.told {
			m.ranThere()
			m.call, m.here, m.there = "post-copy", half{"post", m.here.defined, reasonPostCopy}, half{"post", m.persistent, reasonPostCopy}
			return
		}
		m.call, m.here.process = "performed", "stopped"
	case "performed":
		m.call = "finishing"
	case "finishing":
		m.ranThere()
		m.call, m.there = "started", half{"running", m.persistent, "migrated"}
	case "started":
		m.call, m.here = "", half{}
	case "post-copy":
		m.arrive()
		m.call, m.here = "", half{}
	}
}

// arrive is all memory's having come.
func (m *model) arrive() { m.there = half{"running", m.there.defined, "migrated"} }

// unattended is QEMU's ending a post-copy that no call is at work on.
func (m *model) unattended() {
	if m.post() && m.call == "" && m.lan && !m.parted {
		if m.there.process == "post" && m.thereUp {
			m.arrive()
		}
		if m.there.process == "running" && m.here.process == "post" && m.hereUp {
			m.here = half{defined: m.here.defined}
		}
	}
}

func (m *model) killSource() {
	if !m.hereUp {
		return
	}
	m.hereUp = false
	was := m.call
	m.call = ""
	switch was {
	case "copying": // at its restart libvirtd cancels it
		m.over = false
		m.dropIncoming()
	case "performed": // and knows no better than to leave it stopped
		m.dropIncoming()
	case "finishing": // the destination carries out what it was told
		m.ranThere()
		m.there = half{"running", m.persistent, "migrated"}
	}
}

// rebootSource is the host's going down, and its coming back.
func (m *model) rebootSource() {
	m.killSource()
	m.lost = m.lost || m.here.process == "post"
	m.here, m.rebooted = half{defined: m.here.defined}, true
	if !m.persistent && m.runs() == 0 {
		m.lost = true
	}
	if m.here.defined && !m.keptOff {
		m.here.process, m.here.reason = "running", "booted"
	}
}

// dropIncoming is the destination's libvirtd finding that its client is gone.
func (m *model) dropIncoming() {
	if m.thereUp && m.there.process == "incoming" {
		m.there = half{}
	}
}

func (m *model) killDestination() {
	if !m.thereUp {
		return
	}
	m.thereUp = false
	m.blind()
	if m.call != "" && m.hereUp {
		m.fail()
	}
}

func (m *model) restart() {
	m.hereUp = true
	if !m.thereUp {
		m.thereUp = true
		if m.there.process == "incoming" && (m.call == "" || m.call == "copying") {
			m.there = half{}
		}
	}
	if m.call == "" && m.there.process == "incoming" {
		m.there = half{}
	}
}

func (m *model) killQEMU(source bool) {
	if m.call != "" && m.hereUp {
		m.fail()
	}
	if source {
		m.lost = m.lost || m.here.process == "running" || m.here.process == "post" || m.here.process == "stopped" && m.runs() == 0
		m.here = half{defined: m.here.defined}
	} else {
		m.lost = m.lost || m.there.process == "running" || m.there.process == "post"
		m.there = half{defined: m.there.defined}
	}
}

func (m *model) story() Story {
	s := Story{Begun: CopyBegun, Persistent: m.persistent, Came: m.noted, Watched: m.watched && !m.noted, Rebooted: m.keptOff && m.rebooted}
	switch {
	case m.seen:
		s.Begun = MoveSeen
	case m.begun == 0:
		s.Begun = NothingBegun
	case m.over:
		s.Begun = CopyOver
	case m.told:
		s.Begun = PostCopyBegun
	}
	return s
}

// belay is one turn of an agent, new or old: it looks, and does what is safe. Between two
// looks, and between its looks at the two hosts, other things happen.
func (m *model) belay(t *rapid.T, between func()) {
	look := func() Verdict {
		src := m.view(m.here, true)
		between()
		return Reconcile(src, m.view(m.there, false), m.story())
	}
	v := look()
	if v.Doubt() > 0 {
		between()
		if again := look(); again != v {
			return
		}
	}
	switch v.Action {
	case Begin:
		if m.begun < 3 && m.hereUp && m.thereUp && m.lan && m.here.process == "running" && m.there == (half{}) && m.call == "" {
			m.begun, m.over, m.told = m.begun+1, false, false
			m.watched, m.noted, m.keptOff, m.rebooted = true, false, m.persistent, false
			m.call, m.there = "copying", half{process: "incoming"}
		}
	case Watch:
		if m.call == "copying" && m.postCopies {
			m.told = true
		}
	case ResumeSource, StartSource:
		if m.there.process != "" || m.ran || m.call != "" {
			t.Fatalf("%s: %+v", v.Action, m)
		}
		if was := map[Action]string{ResumeSource: "stopped"}[v.Action]; m.hereUp && m.here.process == was {
			m.here.process, m.here.reason = "running", "unpaused"
		}
	case ResumePostCopy:
		if m.hereUp && m.thereUp && m.lan && m.parted && m.here.process == "post" && m.there.process == "post" {
			m.parted, m.call = false, "post-copy"
			m.here.reason, m.there.reason = reasonPostCopy, reasonPostCopy
		}
	case Finish:
		if m.there.process == "" && !m.there.defined && !m.off && !m.lost && !m.third {
			t.Fatalf("finished: %+v", m)
		}
		m.seen = true
	case RemoveDefinition:
		if m.here.process != "" || !m.there.defined {
			t.Fatalf("definition removed: %+v", m)
		}
		m.seen, m.here.defined = true, false
	case Alarm:
		m.alarmed = true
	}
}

// TestTwoHosts lets everything die in any order: Belay never makes a second copy run, and
// when all is well again the guest runs on one host, or a person has been asked for a
// reason.
func TestTwoHosts(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		m := &model{here: half{"running", true, "booted"}, hereUp: true, thereUp: true, lan: true, persistent: rapid.Bool().Draw(t, "persistent")}
		m.here.defined = m.persistent
		events := map[string]func(){
			"step": m.step, "QEMU ends by itself": m.unattended,
			"source's libvirtd killed": m.killSource, "destination's libvirtd killed": m.killDestination, "libvirtd restarted": m.restart,
			"LAN cut": func() { m.lan = false }, "LAN back": func() { m.lan = true },
			"keepalive": func() {
				if !m.lan && m.call != "" && m.hereUp {
					m.fail()
				}
			},
			"TCP gives up": func() {
				if m.post() && (!m.lan || rapid.Bool().Draw(t, "reset")) && m.here.process == "post" && m.there.process == "post" {
					m.parted, m.call = true, ""
					m.here.reason, m.there.reason = reasonPostCopyFailed, reasonPostCopyFailed
				}
			},
			"shut down on the destination": func() {
				if m.there.process == "running" && m.call == "" && m.thereUp {
					m.off, m.there = true, half{defined: m.there.defined}
				}
			},
			"moved on by hand": func() {
				if m.there.process == "running" && m.call == "" && m.thereUp {
					m.third, m.there = true, half{}
				}
			},
			"destination's belayd killed": m.blind, "source rebooted": m.rebootSource,
			"source's QEMU killed": func() { m.killQEMU(true) }, "destination's QEMU killed": func() { m.killQEMU(false) },
		}
		// Not all in one run: what is rare together would never come in the right order.
		faults := []string{"source's libvirtd killed", "destination's libvirtd killed", "LAN cut", "LAN back", "keepalive", "TCP gives up",
			"shut down on the destination", "moved on by hand", "destination's belayd killed", "source rebooted",
			"source's QEMU killed", "destination's QEMU killed"}
		often := append(rapid.SliceOfNDistinct(rapid.SampledFrom(faults), 1, 6, rapid.ID[string]).Draw(t, "faults"),
			"step", "step", "step", "QEMU ends by itself", "libvirtd restarted")
		m.postCopies = rapid.Bool().Draw(t, "goes on as post-copy")
		happen := func() {
			if rapid.IntRange(0, 2).Draw(t, "quiet") == 0 {
				return
			}
			events[rapid.SampledFrom(often).Draw(t, "event")]()
			if m.runs() > 1 && !m.flaw {
				t.Fatalf("two run: %+v", m)
			}
		}
		check := func() {
			if m.runs() > 1 && !m.flaw {
				t.Fatalf("two run: %+v", m)
			}
		}
		for range rapid.IntRange(1, 40).Draw(t, "turns") {
			happen()
			m.belay(t, happen)
			check()
		}
		// All is well again, and stays so.
		for range 30 {
			m.lan = true
			m.restart()
			m.step()
			m.unattended()
			m.belay(t, func() {})
			check()
		}
		switch {
		case m.flaw || m.lost || m.off:
		case m.third && !m.seen && !m.alarmed:
			t.Fatalf("another host has it, and nobody was told: %+v", m)
		case m.runs() == 1 && (!m.post() || m.third && m.alarmed):
		case m.alarmed && (!m.persistent || !m.watched): // there is no proof
		default:
			t.Fatalf("it runs nowhere: %+v", m)
		}
		// What a destination has not seen that was blind, and that was moved on, nobody can tell.
		if m.flaw && m.runs() > 1 && !m.alarmed && !(m.third && m.wasBlind) {
			t.Fatalf("two run, and nobody was told: %+v", m)
		}
		if !m.flaw && !m.lost && !m.off && m.there.process == "running" && m.here != (half{}) {
			if v := Reconcile(m.view(m.here, true), m.view(m.there, false), m.story()); v.State != MovedLeftover {
				t.Fatalf("something is left on the source, and it is %s: %+v", v.State, m)
			}
		}
	})
}
