package board

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"belay/agent/maint"
)

// memory is a store that keeps what it is given, as the journal does: as JSON.
type memory struct {
	t    rapid.TB
	all  [][]byte
	fail error
}

func (m *memory) Append(c maint.EventChange) error {
	if m.fail != nil {
		return m.fail
	}
	b, err := json.Marshal(c)
	if err != nil {
		m.t.Fatal(err)
	}
	m.all = append(m.all, b)
	return nil
}

// again is what a belayd that is started anew finds.
func (m *memory) again() maint.Scheduled {
	s := maint.NewScheduled()
	for _, b := range m.all {
		var c maint.EventChange
		if err := json.Unmarshal(b, &c); err != nil {
			m.t.Fatal(err)
		}
		s.Fold(c)
	}
	return s
}

func web(n int) maint.EventGuest {
	return maint.EventGuest{UUID: fmt.Sprintf("uuid-%d", n), Name: fmt.Sprintf("web-%d", n)}
}

func announce(t rapid.TB, k *Keeper, a Announcement) {
	t.Helper()
	if err := k.Do(func(b Board, now time.Time) (maint.EventChange, error) { return b.Announce(now, a) }); err != nil {
		t.Fatal(err)
	}
}

func start(k *Keeper, id maint.EventID, i maint.Impact, emergency *maint.EventApproval) error {
	return k.Do(func(b Board, now time.Time) (maint.EventChange, error) { return b.Start(now, id, i, emergency) })
}

// A guest is given its notice, to the moment; nothing but an approval or an
// emergency with a reason shortens it.
func TestNotice(t *testing.T) {
	t.Parallel()
	for _, impact := range maint.Impacts {
		t.Run(string(impact), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				k := New(&memory{t: t}, maint.NewScheduled(), nil)
				announce(t, k, Announcement{ID: "e", Impact: impact, Guests: []maint.EventGuest{web(1)}})
				begun := time.Now()
				if err := start(k, "e", impact, nil); err == nil {
					t.Error("it started at once")
				}
				if err := start(k, "e", impact, &maint.EventApproval{By: "root"}); err == nil {
					t.Error("it started in an emergency without a reason")
				}
				if err := k.Wait(t.Context(), []maint.EventID{"e"}); err != nil {
					t.Fatal(err)
				}
				if waited, least := time.Since(begun), maint.MinimumNotice(impact); waited < least || waited > least+time.Second {
					t.Errorf("waited for %s, the notice is %s", waited, least)
				}
				if err := start(k, "e", impact, nil); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// What would be felt more than what was announced needs another event.
func TestImpactDoesNotGrow(t *testing.T) {
	t.Parallel()
	k := New(&memory{t: t}, maint.NewScheduled(), nil)
	announce(t, k, Announcement{ID: "e", Impact: maint.ImpactReboot, Guests: []maint.EventGuest{web(1)}})
	if err := k.Approve(t.Context(), web(1).UUID, "e"); err != nil {
		t.Fatal(err)
	}
	if err := start(k, "e", maint.ImpactRedeploy, nil); err == nil {
		t.Error("an approved reboot became a redeployment")
	}
	if err := start(k, "e", maint.ImpactFreeze, nil); err != nil {
		t.Errorf("less than was announced: %v", err)
	}
}

// One approval does for an event; it may be repeated, also after the event.
func TestApprove(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		k := New(&memory{t: t}, maint.NewScheduled(), nil)
		announce(t, k, Announcement{ID: "e", Impact: maint.ImpactFreeze, Guests: []maint.EventGuest{web(1), web(2)}})
		approve := func(guest int) error { return k.Approve(t.Context(), web(guest).UUID, "e") }
		if err := approve(3); !errors.Is(err, maint.ErrUnknownEvent) {
			t.Errorf("of another: %v", err)
		}
		done := make(chan error)
		go func() { done <- k.Wait(t.Context(), []maint.EventID{"e"}) }()
		synctest.Wait()
		begun := time.Now()
		for range 2 {
			if err := approve(2); err != nil {
				t.Error(err)
			}
		}
		if err := <-done; err != nil || time.Since(begun) > 0 {
			t.Errorf("waited for %s after the approval, %v", time.Since(begun), err)
		}
		if err := start(k, "e", maint.ImpactFreeze, nil); err != nil {
			t.Fatal(err)
		}
		if err := approve(1); err != nil {
			t.Errorf("when it has started: %v", err)
		}
		err := k.Do(func(b Board, now time.Time) (maint.EventChange, error) {
			return b.End(now, "e", map[string]time.Duration{web(1).UUID: time.Second}, "")
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := approve(1); err != nil {
			t.Errorf("right after its end: %v", err)
		}
		if e, err := k.Event("e"); err != nil || e.Approval == nil || e.Approval.By != "guest web-2" {
			t.Errorf("approved by %+v, %v", e.Approval, err)
		}
		time.Sleep(2 * recent)
		if err := approve(1); !errors.Is(err, maint.ErrUnknownEvent) {
			t.Errorf("long after: %v", err)
		}
		if d, _ := k.Document(web(1).UUID); len(d.Events) != 0 || len(k.History(web(1).UUID)) != 1 {
			t.Errorf("shown are %+v", d.Events)
		}
	})
}

// A program that has registered is waited for, until it is ready or its time is
// up; nobody else is.
func TestListeners(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx := t.Context()
		k := New(&memory{t: t}, maint.NewScheduled(), nil)
		guest := web(1).UUID
		for _, l := range []maint.Listener{{Name: "db", Timeout: time.Minute}, {Name: "cache", Timeout: 10 * time.Minute}, {Name: "gone", Timeout: time.Hour}} {
			if err := k.Listen(ctx, guest, l); err != nil {
				t.Fatal(err)
			}
		}
		announce(t, k, Announcement{ID: "e", Impact: maint.ImpactFreeze, Guests: []maint.EventGuest{web(1)}})
		begun := time.Now()
		if err := k.Approve(ctx, guest, "e"); err != nil {
			t.Fatal(err)
		}
		if err := k.Unlisten(ctx, guest, "gone"); err != nil {
			t.Fatal(err)
		}
		if err := k.Ready(ctx, guest, "nobody", "e"); err == nil {
			t.Error("somebody is ready who was not registered")
		}
		if err := k.Ready(ctx, web(2).UUID, "cache", "e"); !errors.Is(err, maint.ErrUnknownEvent) {
			t.Errorf("another guest's program is ready: %v", err)
		}
		if err := k.Ready(ctx, guest, "cache", "e"); err != nil {
			t.Error(err)
		}
		if err := k.Wait(ctx, []maint.EventID{"e"}); err != nil || time.Since(begun) != time.Minute {
			t.Errorf("waited for %s, not for the one that is silent: %v", time.Since(begun), err)
		}
	})
}

func TestGarbageIsRefused(t *testing.T) {
	t.Parallel()
	k := New(&memory{t: t}, maint.NewScheduled(), nil)
	fit := Announcement{ID: "e", Impact: maint.ImpactFreeze, Guests: []maint.EventGuest{web(1)}}
	for name, spoil := range map[string]func(*Announcement){
		"no ID":            func(a *Announcement) { a.ID = "" },
		"no impact":        func(a *Announcement) { a.Impact = "Explode" },
		"no guest":         func(a *Announcement) { a.Guests = nil },
		"a long text":      func(a *Announcement) { a.Description = string(make([]byte, 10_000)) },
		"a negative time":  func(a *Announcement) { a.Duration = -time.Hour },
		"in another world": func(a *Announcement) { a.NotBefore = time.Now().AddDate(5, 0, 0) },
	} {
		a := fit
		spoil(&a)
		err := k.Do(func(b Board, now time.Time) (maint.EventChange, error) { return b.Announce(now, a) })
		var p *maint.Problem
		if !errors.As(err, &p) || p.Remedy == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, l := range []maint.Listener{{}, {Name: "x"}, {Name: "x", Timeout: 1000 * time.Hour}, {Name: string(make([]byte, 1000)), Timeout: time.Second}} {
		if err := k.Listen(t.Context(), "u", l); err == nil {
			t.Errorf("listener %+v is accepted", l)
		}
	}
	for i := range 2 * maxListeners {
		_ = k.Listen(t.Context(), "u", maint.Listener{Name: fmt.Sprint(i), Timeout: time.Second})
	}
	k.See(func(b Board) {
		if n := len(b.Listeners["u"]); n != maxListeners {
			t.Errorf("one guest has registered %d", n)
		}
	})
}

// What cannot be kept is not seen.
func TestNothingIsSeenThatIsNotKept(t *testing.T) {
	t.Parallel()
	m := &memory{t: t}
	k := New(m, maint.NewScheduled(), nil)
	announce(t, k, Announcement{ID: "e", Impact: maint.ImpactFreeze, Guests: []maint.EventGuest{web(1)}})
	before, changed := k.Document(web(1).UUID)
	m.fail = errors.New("no space left on device")
	if err := k.Approve(t.Context(), web(1).UUID, "e"); err == nil {
		t.Error("it was approved")
	}
	if after, _ := k.Document(web(1).UUID); !reflect.DeepEqual(before, after) {
		t.Errorf("%+v became %+v", before, after)
	}
	select {
	case <-changed:
		t.Error("who waits was told")
	default:
	}
}

// storeFunc is a store that does as it says.
type storeFunc func(maint.EventChange) error

func (f storeFunc) Append(c maint.EventChange) error { return f(c) }

// Who asks while something is written is shown what was there before, and does not
// wait for the disk.
func TestNobodyWaitsForTheDisk(t *testing.T) {
	t.Parallel()
	var k *Keeper
	var writing [][]maint.ScheduledEvent
	k = New(storeFunc(func(maint.EventChange) error {
		seen := make(chan []maint.ScheduledEvent)
		go func() {
			d, _ := k.Document(web(1).UUID)
			seen <- d.Events
		}()
		select {
		case events := <-seen:
			writing = append(writing, events)
		case <-time.After(10 * time.Second):
			t.Error("who asks waits for the disk")
		}
		return nil
	}), maint.NewScheduled(), nil)
	for i := range 3 {
		announce(t, k, Announcement{ID: maint.EventID(fmt.Sprint(i)), Impact: maint.ImpactFreeze, Guests: []maint.EventGuest{web(1)}})
		if d, _ := k.Document(web(1).UUID); len(d.Events) != i+1 {
			t.Errorf("%d events are seen after %d", len(d.Events), i+1)
		}
	}
	for i, events := range writing {
		if len(events) != i {
			t.Errorf("%d events were seen while the one after %d was written", len(events), i)
		}
	}
}

// Random histories: of two hosts between which guests move, and whose belayds die.
func TestHistories(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		// Alone: rapid would ask for the test's deadline, which is of another clock.
		alone := struct{ rapid.TB }{t}
		for range 50 { // some forty histories each
			rapid.Check(alone, func(t *rapid.T) { newWorld(t).Run(t) })
		}
	})
}

type host struct {
	store  *memory
	keeper *Keeper
}

// world checks after each step what a guest may rely on.
type world struct {
	hosts [2]*host
	at    [3]int                          // where each guest is
	seen  [3]map[uint64]string            // what a document of an incarnation showed
	given map[maint.EventID]time.Duration // the notice that is due
	told  map[maint.EventID]time.Time     // when a guest could first see it
	free  map[maint.EventID]bool          // approved, or an emergency
	next  int
}

func newWorld(t *rapid.T) *world {
	w := &world{given: make(map[maint.EventID]time.Duration), told: make(map[maint.EventID]time.Time), free: make(map[maint.EventID]bool)}
	for i := range w.hosts {
		m := &memory{t: t}
		w.hosts[i] = &host{m, New(m, m.again(), nil)}
	}
	for i := range w.seen {
		w.seen[i] = make(map[uint64]string)
	}
	return w
}

func (w *world) Run(t *rapid.T) {
	t.Repeat(map[string]func(*rapid.T){
		"": w.check,
		"announce": func(t *rapid.T) {
			w.next++
			id := maint.EventID(fmt.Sprintf("e%03d", w.next))
			a := Announcement{ID: id, Impact: rapid.SampledFrom(maint.Impacts).Draw(t, "impact")}
			h := rapid.IntRange(0, 1).Draw(t, "host")
			for g, at := range w.at {
				if at == h && rapid.Bool().Draw(t, "affected") {
					a.Guests = append(a.Guests, web(g))
				}
			}
			if len(a.Guests) == 0 {
				return
			}
			if rapid.Bool().Draw(t, "later") {
				a.NotBefore = time.Now().Add(time.Duration(rapid.IntRange(0, 100).Draw(t, "min")) * time.Minute)
			}
			announce(t, w.hosts[h].keeper, a)
			w.given[id], w.told[id] = maint.MinimumNotice(a.Impact), time.Now()
		},
		"approve": func(t *rapid.T) {
			g, id := w.draw(t)
			if w.keeper(g).Approve(context.Background(), web(g).UUID, id) == nil {
				w.free[id] = true
			}
		},
		"start": func(t *rapid.T) {
			g, id := w.draw(t)
			var emergency *maint.EventApproval
			if rapid.IntRange(0, 9).Draw(t, "emergency") == 0 {
				emergency = &maint.EventApproval{By: "root", Reason: "smoke"}
			}
			was, err := w.keeper(g).Event(id)
			if err != nil {
				return
			}
			if start(w.keeper(g), id, rapid.SampledFrom(maint.Impacts).Draw(t, "impact"), emergency) == nil {
				if early := time.Since(w.told[id]) < w.given[id] || time.Now().Before(was.NotBefore); early && !w.free[id] && emergency == nil {
					t.Fatalf("event %s started %s after its announcement", id, time.Since(w.told[id]))
				}
			}
		},
		"end": func(t *rapid.T) {
			g, id := w.draw(t)
			_ = w.keeper(g).Do(func(b Board, now time.Time) (maint.EventChange, error) { return b.End(now, id, nil, "") })
		},
		"cancel": func(t *rapid.T) {
			g, id := w.draw(t)
			_ = w.keeper(g).Do(func(b Board, now time.Time) (maint.EventChange, error) { return b.Cancel(now, id, "no need") })
		},
		"listen": func(t *rapid.T) {
			g, id := w.draw(t)
			_ = w.keeper(g).Listen(context.Background(), web(g).UUID, maint.Listener{Name: "l", Timeout: time.Duration(1 + w.next)})
			_ = w.keeper(g).Ready(context.Background(), web(g).UUID, "l", id)
		},
		"move": func(t *rapid.T) {
			g := rapid.IntRange(0, len(w.at)-1).Draw(t, "guest")
			from, to := w.keeper(g), w.hosts[1-w.at[g]].keeper
			var carried maint.GuestEvents
			from.See(func(b Board) { carried = b.Carry(time.Now(), web(g).UUID) })
			lost := rapid.IntRange(0, 9).Draw(t, "lost") == 0 // with what it would have carried
			if lost {                                         // the clock is what is left then
				carried = maint.GuestEvents{UUID: web(g).UUID}
				time.Sleep(time.Hour)
			}
			for range rapid.IntRange(1, 2).Draw(t, "times") {
				if err := to.Do(func(b Board, now time.Time) (maint.EventChange, error) { return b.Adopt(now, carried), nil }); err != nil {
					t.Fatal(err)
				}
			}
			if err := from.Do(func(b Board, now time.Time) (maint.EventChange, error) { return b.Leave(now, web(g).UUID), nil }); err != nil {
				t.Fatal(err)
			}
			w.at[g] = 1 - w.at[g]
		},
		"restart": func(t *rapid.T) {
			h := w.hosts[rapid.IntRange(0, 1).Draw(t, "host")]
			h.keeper = New(h.store, h.store.again(), nil)
		},
		"wait": func(t *rapid.T) {
			time.Sleep(time.Duration(rapid.IntRange(0, 20*60).Draw(t, "s")) * time.Second)
		},
	})
}

func (w *world) keeper(g int) *Keeper { return w.hosts[w.at[g]].keeper }

func (w *world) draw(t *rapid.T) (guest int, id maint.EventID) {
	return rapid.IntRange(0, len(w.at)-1).Draw(t, "guest"), maint.EventID(fmt.Sprintf("e%03d", rapid.IntRange(max(1, w.next-5), w.next+1).Draw(t, "event")))
}

// check: a document tells a guest of itself alone, no incarnation has ever shown
// something else, and what is on disk is what is seen.
func (w *world) check(t *rapid.T) {
	for g := range w.at {
		d, _ := w.keeper(g).Document(web(g).UUID)
		var shown []string
		for _, e := range d.Events {
			if !About(e, web(g).UUID) || e.State.Over() {
				t.Fatalf("guest %d is shown %+v", g, e)
			}
			shown = append(shown, fmt.Sprint(e.ID, e.Guests, e.Impact, e.State, e.Approval != nil, e.NotBefore, e.Description))
		}
		text := fmt.Sprint(shown)
		if was, used := w.seen[g][d.Incarnation]; used && was != text {
			t.Fatalf("incarnation %d of guest %d showed %s, and shows %s", d.Incarnation, g, was, text)
		}
		w.seen[g][d.Incarnation] = text
	}
	for _, h := range w.hosts {
		again := New(h.store, h.store.again(), nil)
		for g, at := range w.at {
			if w.hosts[at] != h {
				continue
			}
			x, _ := again.Document(web(g).UUID)
			y, _ := h.keeper.Document(web(g).UUID)
			if x.Incarnation != y.Incarnation || !slices.EqualFunc(x.Events, y.Events, func(a, b maint.ScheduledEvent) bool {
				return a.ID == b.ID && a.State == b.State && a.NotBefore.Equal(b.NotBefore)
			}) {
				t.Fatalf("a belayd started anew would show guest %d %+v, not %+v", g, x, y)
			}
		}
	}
}

// What a guest's owner has picked goes with it, to a host that has never heard of the
// campaign, and a way there and back gives no deferral back.
func TestCampaignsMove(t *testing.T) {
	t.Parallel()
	now := time.Now().UTC().Round(0)
	uuid := web(1).UUID
	at := func(defers int) maint.Campaign {
		return maint.Campaign{ID: "c", Impact: maint.ImpactFreeze, Created: now, Opens: now, Deadline: now.Add(time.Hour), MaxDefers: 3,
			Guests: map[string]maint.GuestCampaign{
				uuid:        {Guest: "web-1", State: maint.CampaignPending, At: now.Add(time.Hour), Defers: defers},
				web(2).UUID: {Guest: "web-2", State: maint.CampaignPending, At: now.Add(time.Hour)}}}
	}
	from := maint.NewScheduled()
	from.Fold(maint.EventChange{Campaigns: []maint.Campaign{at(2)}})
	carried := Board{Scheduled: from}.Carry(now, uuid)
	if len(carried.Campaigns) != 1 || len(carried.Campaigns[0].Guests) != 1 {
		t.Fatalf("%+v goes along", carried.Campaigns)
	}
	for name, known := range map[string][]maint.Campaign{"a new host": nil, "one that it was on before": {at(1)}} {
		to := maint.NewScheduled()
		to.Fold(maint.EventChange{Campaigns: known})
		for range 2 {
			to.Fold(Board{Scheduled: to}.Adopt(now, carried))
		}
		if g := to.Campaigns["c"].Guests[uuid]; g.Defers != 2 || g.State != maint.CampaignPending {
			t.Errorf("%s: %+v", name, g)
		}
	}
}
