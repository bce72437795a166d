package agent_test

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"belay/agent/config"
	"belay/agent/maint"
)

// guestsWell has guests asked around a change, and between and after changes.
const guestsWell = `
[[checks]]
name = "guests"
when = ["before", "between", "after"]
guests = true
`

// surgery is a server that answers for each guest, of which one may be ill.
type surgery struct {
	*httptest.Server
	ill   atomic.Pointer[string] // the guest, "" for none
	asked atomic.Int32
	onIll func() // called when the guest that is ill is asked for
}

func newSurgery(t *testing.T) *surgery {
	s := &surgery{onIll: func() {}}
	s.ill.Store(new(string))
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.asked.Add(1)
		if r.URL.Path == "/"+*s.ill.Load() {
			s.onIll()
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	}))
	t.Cleanup(s.Close)
	return s
}

func (s *surgery) health() config.Health {
	return config.Health{Guests: []string{"web-*"}, HTTP: s.URL + "/{guest}", Failures: 10,
		Every: config.Duration{Duration: time.Millisecond}, Within: config.Duration{Duration: patience}}
}

// TestApplyGuestsHealth: a guest that is not as well after a change as before has the update
// taken back, stopped, or gone on with; one that was ill before has none of it.
func TestApplyGuestsHealth(t *testing.T) {
	t.Parallel()
	sick := func(u *updates, s *surgery) { name := "web-2"; s.ill.Store(&name) }
	for _, c := range []struct {
		name, manifest string
		before         func(*updates, *surgery)
		change         func(*updates, *surgery) // what the change does to guests
		want           maint.Outcome
		says           string
	}{
		{"all well", byPause + guestsWell, nil, nil, maint.OutcomeDone, ""},
		{"one ill since", byPause + guestsWell, nil, sick, maint.OutcomeFailed, "guest web-2 is not well: answers 503"},
		{"one ill since, and stop", byPause + guestsWell + "on_fail = \"stop\"\n", nil, sick, maint.OutcomeStuck, "guest web-2 is not well: answers 503"},
		{"one ill since, and go on", byPause + guestsWell + "on_fail = \"go-on\"\n", nil, sick, maint.OutcomeDone, "guest web-2 is not well: answers 503"},
		{"one ill before", byPause + guestsWell, sick, nil, maint.OutcomeDone, "guest web-2 is not well before the update: answers 503"},
		{"one crashed", byPause + guestsWell, nil, func(u *updates, _ *surgery) { u.a.Host.Stop(u.t, u.uuids["web-3"], "crashed") }, maint.OutcomeFailed, "guest web-3 is not well: is shut off (crashed)"},
		{"one shut down by itself", untouched + guestsWell, nil, func(u *updates, _ *surgery) { u.a.Host.Stop(u.t, u.uuids["web-3"], "shutdown") }, maint.OutcomeDone, ""},
		{"one with a disk that fails", untouched + guestsWell, nil, func(u *updates, _ *surgery) { u.a.Host.FailDisk(u.t, u.uuids["web-1"]) }, maint.OutcomeFailed, "guest web-1 is not well: is paused (I/O error)"},
		{"one paused by its owner", untouched + guestsWell, nil, func(u *updates, _ *surgery) { u.a.Host.Pause(u.t, u.uuids["web-1"]) }, maint.OutcomeDone, ""},
		{"one that Belay cannot release", byPause + guestsWell, nil, func(u *updates, _ *surgery) { u.a.Host.TakeLease(u.t, u.uuids["web-1"]) }, maint.OutcomeFailed, "guest web-1 is not well: is paused (user)"},
		{"one paused before", byPause + guestsWell, func(u *updates, _ *surgery) { u.a.Host.Pause(u.t, u.uuids["web-1"]) }, nil, maint.OutcomeDone, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newSurgery(t)
			u := newUpdates(t, func(cfg *config.Config) {
				cfg.Health, cfg.Hold.MaxPause.Duration = []config.Health{s.health()}, time.Second
			})
			if c.before != nil {
				c.before(u, s)
			}
			p := u.plan(c.manifest, false)
			u.a.Steps.Did = func(what string) {
				if c.change != nil && !strings.Contains(what, "prepare") {
					c.change(u, s)
				}
			}
			op, err := u.a.Client.Apply(u.ctx, maint.ApplyRequest{Plan: p})
			check(t, err)
			op = await(t, u.ctx, u.a, op.ID)
			recs, err := u.a.Client.Records(u.ctx, op.ID)
			check(t, err)
			said, _ := json.Marshal(recs)
			if op.Outcome != c.want || !strings.Contains(string(said), c.says) {
				t.Errorf("%s: %v\n%s", op.Outcome, op.Problems, said)
			}
			if c.says == "" && strings.Contains(string(said), "not well") {
				t.Errorf("somebody is blamed: %s", said)
			}
			if n := s.asked.Load(); n < 3 {
				t.Errorf("guests were asked %d times", n)
			}
		})
	}
}

// TestApplyGuestAgents: of a guest that nothing else says how to ask its guest agent is to
// answer after an update, if it did before.
func TestApplyGuestAgents(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		before, after bool
		want          maint.Outcome
	}{
		"answers":      {true, true, maint.OutcomeDone},
		"never did":    {false, false, maint.OutcomeDone},
		"does no more": {true, false, maint.OutcomeFailed},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var answers atomic.Bool
			answers.Store(c.before)
			u := newUpdates(t, func(cfg *config.Config) {
				cfg.Health = []config.Health{{Guests: []string{"db-*"}, TCP: "127.0.0.1:1"}}
			})
			u.a.Host.PutGuest("mail-1", func(g *maint.Guest) { g.Agent = maint.AgentConnected })
			pings := new(atomic.Int32)
			u.a.Host.OnAgent(func(_, command string, _ json.RawMessage) (any, bool, error) {
				if command != "guest-ping" {
					return nil, false, nil
				}
				pings.Add(1)
				if !answers.Load() {
					return nil, true, errors.New("guest agent is not responding")
				}
				return map[string]any{}, true, nil
			})
			p := u.plan(untouched+guestsWell, false)
			u.a.Steps.Did = func(string) { answers.Store(c.after) }
			op, err := u.a.Client.Apply(u.ctx, maint.ApplyRequest{Plan: p})
			check(t, err)
			op = await(t, u.ctx, u.a, op.ID)
			if op.Outcome != c.want || pings.Load() == 0 {
				t.Errorf("%s after %d pings: %v", op.Outcome, pings.Load(), op.Problems)
			}
			if c.want == maint.OutcomeFailed && !strings.Contains(op.Problems[0].Error(), "guest mail-1 is not well") {
				t.Errorf("%v", op.Problems)
			}
		})
	}
}

// TestApplyHealthThere: a guest that has moved is asked by its new host, and one that is ill
// there has the update taken back.
func TestApplyHealthThere(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ sick, paused bool }{"well": {}, "ill": {sick: true}, "paused by its owner": {true, true}} {
		sick := c.sick && !c.paused
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			here, there := newSurgery(t), newSurgery(t)
			if c.sick {
				name := "web-2"
				there.ill.Store(&name)
			}
			u := newUpdates(t, func(cfg *config.Config) {
				cfg.Health = []config.Health{map[string]*surgery{"a": here, "b": there}[cfg.Host].health()}
			})
			if c.paused {
				there.onIll = sync.OnceFunc(func() { u.Nodes[1].Host.Pause(t, u.uuids["web-2"]) })
			}
			op := u.apply(byMove+guestsWell, false)
			if c.paused {
				u.Nodes[1].Host.Unpause(t, u.uuids["web-2"])
			}
			want, at := maint.OutcomeDone, "b"
			if sick {
				want, at = maint.OutcomeFailed, "a"
			}
			if op.Outcome != want || u.count()[at] != 3 {
				t.Errorf("%s: %v, %v", op.Outcome, op.Problems, u.at())
			}
			if sick && !slices.ContainsFunc(op.Problems, func(p maint.Problem) bool { return strings.Contains(p.Error(), "guest web-2 is not well on b") }) {
				t.Errorf("%v", op.Problems)
			}
		})
	}
}
