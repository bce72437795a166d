package campaign_test

import (
	"encoding/json"
	"maps"
	"os"
	"reflect"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"belay/agent/maint"
	"belay/notify/campaign"
	"belay/notify/window"
)

// word is what a guest's owner has said last, kept by the test from what was
// accepted.
type word struct {
	now bool      // as soon as can be
	at  time.Time // or at this moment; zero: nothing
}

// machine drives a campaign with whatever owners, operators, hosts and clocks do.
type machine struct {
	c       maint.Campaign
	now     time.Time
	windows map[string]window.Schedule
	words   map[string]word
	past    []map[string]maint.GuestCampaign // states that guests may come back with
	ops     int
	begun   map[string]int // by what for
}

var kinds = [][]maint.Window{
	nil,
	{nights},
	{weekends},
	{nights, {Rule: "FREQ=MONTHLY;BYDAY=2TU;BYHOUR=23", Zone: "Australia/Lord_Howe", Length: 5 * hour}},
}

func newMachine(t *rapid.T) *machine {
	m := &machine{now: start, windows: map[string]window.Schedule{}, words: map[string]word{}, begun: map[string]int{}}
	r := campaign.Request{
		ID: "k", By: "root",
		Impact:    rapid.SampledFrom(maint.Impacts).Draw(t, "impact"),
		Duration:  rapid.SampledFrom([]time.Duration{maint.DurationUnknown, 0, time.Minute, hour, 2 * hour}).Draw(t, "duration"),
		MaxDefers: rapid.IntRange(0, 3).Draw(t, "deferrals"),
		Security:  rapid.Bool().Draw(t, "security"),
		Opens:     start.Add(time.Duration(rapid.IntRange(0, 24).Draw(t, "opens")) * hour),
	}
	if r.Security {
		r.Deadline = r.Opens.Add(8 * day)
	}
	for _, uuid := range []string{"a", "b", "c"}[:rapid.IntRange(1, 3).Draw(t, "guests")] {
		m.guest(t, uuid)
		r.Guests = append(r.Guests, campaign.Guest{UUID: uuid, Name: uuid, Windows: m.windows[uuid]})
	}
	var err error
	if m.c, err = campaign.Create(m.now, r); err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *machine) guest(t *rapid.T, uuid string) {
	s, err := window.Parse(rapid.SampledFrom(kinds).Draw(t, "windows")...)
	if err != nil {
		t.Fatal(err)
	}
	m.windows[uuid] = s
}

func (m *machine) anyone(t *rapid.T) string {
	return rapid.SampledFrom(append(slices.Sorted(maps.Keys(m.c.Guests)), "nobody")).Draw(t, "guest")
}

// take accepts what an action gives: a refusal changes nothing, an action does not
// change what it was given, and nothing ever lowers a count of deferrals.
func (m *machine) take(t *rapid.T, do func(c maint.Campaign) (maint.Campaign, error)) bool {
	before := through(t, m.c)
	c, err := do(m.c)
	if !reflect.DeepEqual(m.c, before) {
		t.Fatalf("%+v became %+v under its owner", before, m.c)
	}
	if err != nil && !reflect.DeepEqual(c, before) {
		t.Fatalf("%v, but %+v became %+v", err, before, c)
	}
	for uuid, g := range before.Guests {
		now, still := c.Guests[uuid]
		if still && now.Defers < g.Defers {
			t.Fatalf("%s has lost a deferral: %+v, %+v", uuid, g, now)
		}
		if still && !before.Closed.IsZero() && now.State != g.State && g.State != maint.CampaignRunning {
			t.Fatalf("the campaign is closed, but %s went from %s to %s", uuid, g.State, now.State)
		}
	}
	m.c = c
	return err == nil
}

// through is a campaign that went through JSON.
func through(t *rapid.T, c maint.Campaign) (out maint.Campaign) {
	data, err := json.Marshal(c)
	if err == nil {
		err = json.Unmarshal(data, &out)
	}
	if err != nil || !reflect.DeepEqual(out, c) {
		t.Fatalf("%v: %+v became %+v", err, c, out)
	}
	return out
}

func (m *machine) need() time.Duration { return max(time.Second, m.c.Duration) }

// fits tells whether work at a moment would be in a guest's windows and the campaign.
func (m *machine) fits(uuid string, at time.Time) bool {
	if !at.Before(m.c.Deadline) || at.Add(m.need()).After(m.c.Deadline) {
		return false
	}
	slots := m.windows[uuid].Slots(at, at.Add(m.need()))
	return len(slots) == 1 && slots[0].Start.Equal(at) && slots[0].End.Equal(at.Add(m.need()))
}

func (m *machine) pass(t *rapid.T) {
	switch rapid.IntRange(0, 2).Draw(t, "time passes") {
	case 0:
		m.now = m.now.Add(time.Duration(rapid.Int64Range(0, int64(3*hour)).Draw(t, "for")))
	case 1:
		m.now = m.now.Add(time.Duration(rapid.IntRange(0, 2*24).Draw(t, "hours")) * hour)
	case 2: // to the moment, as the agent does
		at := m.wake(t)
		if at.Before(m.now) {
			return
		}
		m.take(t, func(c maint.Campaign) (maint.Campaign, error) { return campaign.Advance(m.now, c), nil })
		early := at.Add(-1)
		if still := campaign.Advance(early, m.c); !early.Before(m.now) && !reflect.DeepEqual(still, m.c) {
			t.Fatalf("changes before %s: %+v, %+v", at, m.c, still)
		}
		if same := campaign.Advance(at, m.c); at.After(m.now) && reflect.DeepEqual(same, m.c) {
			t.Fatalf("nothing changes at %s: %+v", at, m.c)
		}
		m.now = at
	}
	if rapid.Bool().Draw(t, "advance") {
		m.take(t, func(c maint.Campaign) (maint.Campaign, error) { return campaign.Advance(m.now, c), nil })
	}
}

// wake is when something is due next. The deadline, after which not much can happen,
// is kept for late in the history.
func (m *machine) wake(t *rapid.T) time.Time {
	at := campaign.Wake(m.c)
	if at.Equal(m.c.Deadline) && rapid.IntRange(0, 7).Draw(t, "to the deadline") > 0 {
		return time.Time{}
	}
	return at
}

func (m *machine) book(t *rapid.T) {
	uuid := m.anyone(t)
	span := m.c.Deadline.Sub(m.now) + 2*day
	at := m.now.Add(time.Duration(rapid.Int64Range(0, int64(max(1, span))).Draw(t, "at")) - day)
	if slots := m.windows[uuid].Slots(m.now, m.c.Deadline); len(slots) > 0 && rapid.IntRange(0, 4).Draw(t, "aims") > 0 {
		slot := rapid.SampledFrom(slots).Draw(t, "slot")
		at = slot.Start.Add(time.Duration(rapid.Int64Range(0, int64(slot.End.Sub(slot.Start))).Draw(t, "into")))
	}
	before := campaign.Advance(m.now, m.c).Guests[uuid]
	if !m.take(t, func(c maint.Campaign) (maint.Campaign, error) {
		return campaign.Book(m.now, c, uuid, "ann", at, m.windows[uuid])
	}) {
		return
	}
	if m.now.Before(m.c.Opens) || !m.now.Before(m.c.Deadline) || at.Before(m.now) && !at.Equal(before.At) || !m.fits(uuid, at) {
		t.Fatalf("at %s, booked %s for %s", m.now, uuid, at)
	}
	later := before.State != maint.CampaignPending && at.After(before.At)
	if n := m.c.Guests[uuid].Defers - before.Defers; later && n != 1 || !later && n != 0 {
		t.Fatalf("%+v became %+v: %d deferrals", before, m.c.Guests[uuid], n)
	}
	if after := m.c.Guests[uuid]; after.State != before.State || !after.At.Equal(before.At) {
		m.words[uuid] = word{at: at}
	}
}

func (m *machine) startNow(t *rapid.T) {
	uuid := m.anyone(t)
	if m.take(t, func(c maint.Campaign) (maint.Campaign, error) { return campaign.StartNow(m.now, c, uuid, "ann") }) {
		m.words[uuid] = word{now: true}
	}
}

func (m *machine) deferIt(t *rapid.T) {
	uuid := m.anyone(t)
	had := campaign.Remaining(m.c, uuid)
	if m.take(t, func(c maint.Campaign) (maint.Campaign, error) { return campaign.Defer(m.now, c, uuid) }) {
		if !m.now.Before(m.c.Deadline) || campaign.Remaining(m.c, uuid) != had-1 {
			t.Fatalf("at %s, %s was put off: %+v", m.now, uuid, m.c)
		}
		m.words[uuid] = word{}
	}
}

func (m *machine) begin(t *rapid.T) {
	uuid := m.anyone(t)
	if due := campaign.Due(m.c); len(due) > 0 && rapid.Bool().Draw(t, "due") {
		uuid = due[0]
	}
	was := m.c.Guests[uuid].State
	m.ops++
	op := maint.OpID(time.Duration(m.ops).String())
	if !m.take(t, func(c maint.Campaign) (maint.Campaign, error) { return campaign.Begin(m.now, c, uuid, op) }) {
		return
	}
	said := m.words[uuid]
	booked := !said.at.IsZero() && !m.now.Before(said.at) && !m.now.After(said.at.Add(campaign.Grace)) && m.fits(uuid, m.now)
	if m.now.Before(m.c.Deadline) && !said.now && !booked {
		t.Fatalf("%s was begun at %s; its owner said %+v", uuid, m.now, said)
	}
	if !m.c.Closed.IsZero() || was == maint.CampaignRunning || was == maint.CampaignDone {
		t.Fatalf("%s was begun: %s, campaign closed %s", uuid, was, m.c.Closed)
	}
	m.words[uuid] = word{}
	switch {
	case said.now:
		m.begun["word"]++
	case booked:
		m.begun["booking"]++
	default:
		m.begun["deadline"]++
	}
}

func (m *machine) end(t *rapid.T) {
	uuid := m.anyone(t)
	if rapid.Bool().Draw(t, "well") && (m.c.Guests[uuid].State == maint.CampaignRunning || rapid.IntRange(0, 9).Draw(t, "by itself") == 0) {
		m.take(t, func(c maint.Campaign) (maint.Campaign, error) { return campaign.Done(m.now, c, uuid) })
	} else if m.take(t, func(c maint.Campaign) (maint.Campaign, error) { return campaign.Failed(m.now, c, uuid) }) {
		m.words[uuid] = word{}
	}
}

// travel has a guest come, from another host or back, with what it had at some time.
func (m *machine) travel(t *rapid.T) {
	uuid := rapid.SampledFrom([]string{"a", "b", "c", "d"}).Draw(t, "guest")
	if _, seen := m.windows[uuid]; !seen {
		m.guest(t, uuid)
	}
	if rapid.IntRange(0, 4).Draw(t, "forgotten") == 0 && len(m.c.Guests) > 1 {
		m.take(t, func(c maint.Campaign) (maint.Campaign, error) { return campaign.Remove(m.now, c, uuid), nil })
		m.words[uuid] = word{}
	}
	var came *maint.GuestCampaign
	if len(m.past) > 0 {
		if g, ok := rapid.SampledFrom(m.past).Draw(t, "state")[uuid]; ok {
			came = &g
		}
	}
	before := m.c.Guests[uuid]
	if !m.take(t, func(c maint.Campaign) (maint.Campaign, error) {
		return campaign.Arrive(m.now, c, maint.EventGuest{UUID: uuid, Name: uuid}, came)
	}) {
		return
	}
	g := m.c.Guests[uuid]
	if came != nil && g.Defers < came.Defers {
		t.Fatalf("%s came with %+v and has %+v", uuid, came, g)
	}
	if before.State == maint.CampaignDone && g.State != maint.CampaignDone {
		t.Fatalf("%s was done and is %s", uuid, g.State)
	}
	if came == nil || g.State == before.State && g.At.Equal(before.At) {
		return
	}
	switch { // what its owner said there
	case g.State == maint.CampaignBooked, g.State == maint.CampaignDue && !g.Until.IsZero():
		m.words[uuid] = word{at: g.At}
	case g.State == maint.CampaignDue:
		m.words[uuid] = word{now: true}
	default:
		m.words[uuid] = word{}
	}
}

func (m *machine) check(t *rapid.T) {
	through(t, m.c)
	if m.c.Closed.IsZero() {
		m.past = append(m.past, maps.Clone(m.c.Guests))
	}
	c := campaign.Advance(m.now, m.c)
	over := !m.now.Before(c.Deadline)
	for uuid, g := range c.Guests {
		waits := g.State == maint.CampaignPending || g.State == maint.CampaignBooked
		switch {
		case g.Defers > c.MaxDefers:
			t.Fatalf("%s was put off too often: %+v", uuid, g)
		case !c.Closed.IsZero() && g.State != maint.CampaignDone && g.State != maint.CampaignClosed && g.State != maint.CampaignRunning:
			t.Fatalf("%s has survived the campaign: %+v", uuid, g)
		case over && waits && (g.State == maint.CampaignBooked || g.At.After(m.now.Add(campaign.Retry))):
			t.Fatalf("at %s, past the deadline, %s waits: %+v", m.now, uuid, g)
		case waits && !g.At.After(m.now):
			t.Fatalf("at %s, %s is not due: %+v", m.now, uuid, g)
		case g.State == maint.CampaignBooked && !m.fits(uuid, g.At):
			t.Fatalf("%s is booked outside of its windows: %+v", uuid, g)
		}
		if state, due := g.State, slices.Contains(campaign.Due(c), uuid); due != (state == maint.CampaignDue) {
			t.Fatalf("%s is %s, due: %t", uuid, state, due)
		}
	}
}

// finish plays an agent that works from the deadline on, and sees all guests done.
func (m *machine) finish(t *rapid.T) {
	m.now = later(m.now, m.c.Deadline)
	for range 3 {
		m.c = campaign.Advance(m.now, m.c)
		for _, uuid := range campaign.Due(m.c) {
			m.c, _ = campaign.Begin(m.now, m.c, uuid, "last")
		}
		for uuid, g := range m.c.Guests {
			if g.State == maint.CampaignRunning {
				m.c, _ = campaign.Done(m.now, m.c, uuid)
			}
		}
		m.now = m.now.Add(campaign.Retry)
	}
	for uuid, g := range m.c.Guests {
		if g.State != maint.CampaignDone && (m.c.Closed.IsZero() || g.State != maint.CampaignClosed) {
			t.Fatalf("%s is left: %+v", uuid, g)
		}
	}
	if m.c.Closed.IsZero() && len(m.c.Guests) > 0 {
		t.Fatalf("all are done, and it is not closed: %+v", m.c)
	}
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// Whatever owners, hosts and clocks do: no guest is begun before its moment unless
// its owner said so, none is left after the deadline, bookings are in windows,
// deferrals are bounded and never forgotten, and nothing goes on after Close.
func TestHistories(t *testing.T) {
	t.Parallel()
	rounds := 20
	if os.Getenv("BELAY_LONG") != "" {
		rounds = 200
	}
	begun := map[string]int{}
	for range rounds { // of a hundred histories each, see -rapid.checks
		rapid.Check(t, func(t *rapid.T) {
			m := newMachine(t)
			t.Repeat(map[string]func(*rapid.T){
				"":      m.check,
				"pass":  m.pass,
				"book":  m.book,
				"start": m.startNow,
				"defer": m.deferIt,
				"begin": m.begin,
				"end":   m.end,
				"agent": func(t *rapid.T) { // is up when something is due, perhaps a little late
					if at := m.wake(t); at.After(m.now) {
						m.now = at.Add(time.Duration(rapid.SampledFrom([]int{0, 0, 30, 150}).Draw(t, "late")) * time.Minute)
					}
					m.take(t, func(c maint.Campaign) (maint.Campaign, error) { return campaign.Advance(m.now, c), nil })
					for range campaign.Due(m.c) {
						m.begin(t)
					}
				},
				"travel": m.travel,
				"close": func(t *rapid.T) {
					if rapid.IntRange(0, 15).Draw(t, "really") > 0 {
						t.Skip()
					}
					m.take(t, func(c maint.Campaign) (maint.Campaign, error) { return campaign.Close(m.now, c), nil })
				},
			})
			m.finish(t)
			for how, n := range m.begun {
				begun[how] += n
			}
		})
	}
	t.Log(begun)
	if begun["booking"] == 0 || begun["word"] == 0 || begun["deadline"] == 0 {
		t.Errorf("the histories are all alike: %v", begun)
	}
}
