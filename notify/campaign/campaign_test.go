package campaign_test

import (
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/notify/campaign"
	"belay/notify/window"
)

const (
	hour = time.Hour
	day  = 24 * hour
)

// start is a Monday.
var start = time.Date(2026, 12, 7, 9, 0, 0, 0, time.UTC)

func schedule(t testing.TB, windows ...maint.Window) window.Schedule {
	t.Helper()
	s, err := window.Parse(windows...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

var (
	nights   = maint.Window{Rule: "FREQ=DAILY;BYHOUR=2", Zone: "Europe/Berlin", Length: 2 * hour} // from 01:00 UTC
	weekends = maint.Window{Rule: "FREQ=WEEKLY;BYDAY=SA,SU;BYHOUR=10", Zone: "UTC", Length: 4 * hour}
)

// bed is a campaign of one guest, "a", with weekend windows.
type bed struct {
	*testing.T
	c       maint.Campaign
	now     time.Time
	windows window.Schedule
}

func newBed(t *testing.T, change func(*campaign.Request)) *bed {
	t.Helper()
	b := &bed{T: t, now: start, windows: schedule(t, weekends)}
	r := campaign.Request{
		ID: "kernel-1", Impact: maint.ImpactReboot, Duration: hour, By: "root", MaxDefers: 2,
		Guests: []campaign.Guest{{UUID: "a", Name: "web-1", Windows: b.windows}},
	}
	if change != nil {
		change(&r)
	}
	c, err := campaign.Create(b.now, r)
	if err != nil {
		t.Fatal(err)
	}
	b.c = c
	return b
}

// do takes what an action gives; want is in its error, "" for none.
func (b *bed) do(want string) func(c maint.Campaign, err error) {
	return func(c maint.Campaign, err error) {
		b.Helper()
		if err == nil && want != "" || err != nil && (want == "" || !strings.Contains(err.Error(), want)) {
			b.Fatalf("got error %v, want %q", err, want)
		}
		if err != nil && !reflect.DeepEqual(c, b.c) {
			b.Fatalf("refused, and changed to %+v", c)
		}
		b.c = c
	}
}

func (b *bed) book(at time.Time) (maint.Campaign, error) {
	return campaign.Book(b.now, b.c, "a", "ann", at, b.windows)
}

func (b *bed) defers() (maint.Campaign, error) { return campaign.Defer(b.now, b.c, "a") }
func (b *bed) startNow() (maint.Campaign, error) {
	return campaign.StartNow(b.now, b.c, "a", "ann")
}
func (b *bed) begin(op maint.OpID) (maint.Campaign, error) {
	return campaign.Begin(b.now, b.c, "a", op)
}

// at lets time pass.
func (b *bed) at(now time.Time) {
	b.now, b.c = now, campaign.Advance(now, b.c)
}

func (b *bed) is(state maint.CampaignState, at time.Time, defers int) {
	b.Helper()
	if g := b.c.Guests["a"]; g.State != state || !g.At.Equal(at) || g.Defers != defers {
		b.Fatalf("guest is %+v, want %s at %s with %d deferrals", g, state, at, defers)
	}
}

// saturday is the n-th Saturday after the start, at 10:00.
func saturday(n int) time.Time { return start.Add(time.Duration(7*n-2)*day + hour) }

func TestCreate(t *testing.T) {
	b := newBed(t, nil)
	if want := start.Add(campaign.SelfServicePhase); !b.c.Deadline.Equal(want) || !b.c.Opens.Equal(start) {
		t.Errorf("opens %s, deadline %s", b.c.Opens, b.c.Deadline)
	}
	b.is(maint.CampaignPending, b.c.Deadline, 0)
	if at := campaign.Wake(b.c); !at.Equal(b.c.Deadline) {
		t.Errorf("wakes at %s", at)
	}

	later := newBed(t, func(r *campaign.Request) { r.Opens = start.Add(day) })
	if want := start.Add(36 * day); !later.c.Deadline.Equal(want) {
		t.Errorf("deadline %s, want %s", later.c.Deadline, want)
	}
	urgent := newBed(t, func(r *campaign.Request) { r.Security, r.Deadline = true, start.Add(7*day) })
	if !urgent.c.Security || !urgent.c.Deadline.Equal(start.Add(7*day)) {
		t.Errorf("got %+v", urgent.c)
	}
}

func TestCreateRefuses(t *testing.T) {
	none := window.Schedule{}
	for _, c := range []struct {
		change func(*campaign.Request)
		want   string
	}{
		{func(r *campaign.Request) { r.ID = "../1" }, "no ID"},
		{func(r *campaign.Request) { r.Impact = "Nap" }, `impact "Nap"`},
		{func(r *campaign.Request) { r.Duration = -hour }, "duration of -1h"},
		{func(r *campaign.Request) { r.MaxDefers = -1 }, "-1 deferrals"},
		{func(r *campaign.Request) { r.MaxDefers = 1000 }, "1000 deferrals"},
		{func(r *campaign.Request) { r.Description = strings.Repeat("x", 2000) }, "description"},
		{func(r *campaign.Request) { r.Deadline = start.Add(34 * day) }, "816h0m0s to pick, less than 35 days"},
		{func(r *campaign.Request) { r.Deadline, r.Security = start, true }, "is not after"},
		{func(r *campaign.Request) { r.Deadline, r.Security = start.Add(-day), true }, "is not after"},
		{func(r *campaign.Request) { r.Deadline = start.Add(500 * day) }, "days ahead"},
		{func(r *campaign.Request) { r.Guests = nil }, "for no guest"},
		{func(r *campaign.Request) { r.Guests = append(r.Guests, r.Guests[0]) }, "no UUID of its own"},
		{func(r *campaign.Request) { r.Guests[0].UUID = "" }, "no UUID of its own"},
		{func(r *campaign.Request) {
			r.Guests[0].Windows = none
			r.Deadline, r.Security = start.Add(15*time.Minute), true
		}, "guest web-1: has no slot"}, // notice leaves nothing
	} {
		r := campaign.Request{ID: "k", Impact: maint.ImpactReboot, Guests: []campaign.Guest{{UUID: "a", Name: "web-1"}}}
		c.change(&r)
		if _, err := campaign.Create(start, r); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("got %v, want %q", err, c.want)
		}
	}
}

// Each guest for which nothing could be booked is named.
func TestCreateNamesGuestsWithoutSlot(t *testing.T) {
	r := campaign.Request{
		ID: "k", Impact: maint.ImpactFreeze, Duration: 3 * hour, Security: true,
		Deadline: saturday(1).Add(hour), // Saturday 11:00
		Guests: []campaign.Guest{
			{UUID: "1", Name: "night", Windows: schedule(t, nights)},                                                        // too short
			{UUID: "2", Name: "weekend", Windows: schedule(t, weekends)},                                                    // cut off by the deadline
			{UUID: "3", Name: "long", Windows: schedule(t, maint.Window{Rule: nights.Rule, Zone: "UTC", Length: 4 * hour})}, // fits
			{UUID: "4", Name: "always"},
		},
	}
	_, err := campaign.Create(start, r)
	var refusal *maint.Refusal
	if !errors.As(err, &refusal) || len(refusal.Problems) != 2 {
		t.Fatalf("got %v", err)
	}
	for n, name := range []string{"guest night", "guest weekend"} {
		if p := refusal.Problems[n]; p.Subject != name || p.Code != maint.CodeNoSlot || p.Remedy == "" {
			t.Errorf("got %+v", p)
		}
	}
	r.Guests = r.Guests[2:]
	if _, err := campaign.Create(start, r); err != nil {
		t.Error(err)
	}
}

func TestBookedMoment(t *testing.T) {
	b := newBed(t, nil)
	at := saturday(1).Add(30 * time.Minute)
	b.do("")(b.book(at))
	b.is(maint.CampaignBooked, at, 0)
	if g := b.c.Guests["a"]; g.By != "ann" || !g.Until.Equal(at.Add(campaign.Grace)) {
		t.Errorf("got %+v", g)
	}
	b.at(at.Add(-1))
	b.do("is not due")(b.begin("op-1"))
	b.at(campaign.Wake(b.c))
	b.is(maint.CampaignDue, at, 0)
	if due := campaign.Due(b.c); len(due) != 1 || due[0] != "a" {
		t.Errorf("due: %v", due)
	}
	b.do("")(b.begin("op-1"))
	b.do("")(b.begin("op-1"))
	b.do("has operation op-1 at work")(b.begin("op-2"))
	b.do("is running")(b.book(saturday(2)))
	b.do("is running")(b.defers())
	b.do("")(b.startNow())
	b.is(maint.CampaignRunning, at, 0)
	b.do("")(campaign.Done(b.now, b.c, "a"))
	b.do("")(campaign.Done(b.now, b.c, "a"))
	b.is(maint.CampaignDone, b.now, 0)
	if !b.c.Closed.Equal(b.now) || !campaign.Wake(b.c).IsZero() {
		t.Errorf("not closed: %+v", b.c)
	}
	b.do("")(b.startNow())
	b.do("is closed")(b.book(saturday(2)))
}

func TestBookRefuses(t *testing.T) {
	b := newBed(t, func(r *campaign.Request) { r.Opens = start.Add(hour) })
	b.do("opens at 2026-12-07 10:00")(b.book(saturday(1)))
	b.do("opens at 2026-12-07 10:00")(b.startNow())
	b.at(start.Add(hour))
	for _, c := range []struct {
		at   time.Time
		want string
	}{
		{b.now.Add(-1), "is past"},
		{time.Time{}, "is past"},
		{b.c.Deadline, "is not before the deadline"},
		{saturday(1).Add(-1), "is not in its windows"},
		{saturday(1).Add(3*hour + 1), "with 1h0m0s for the work"},
	} {
		b.do(c.want)(b.book(c.at))
		_, err := b.book(c.at)
		const slots = "book a moment within 2026-12-12 10:00 UTC to 2026-12-12 13:00 UTC, 2026-12-13 10:00 UTC to 2026-12-13 13:00 UTC, 2026-12-19"
		if !strings.Contains(err.Error(), slots) {
			t.Errorf("names no slots: %v", err)
		}
	}
	b.do("is not in campaign kernel-1")(campaign.Book(b.now, b.c, "b", "ann", saturday(1), b.windows))
	b.do("")(b.book(saturday(1).Add(3 * hour))) // as late as can be
	if g := b.c.Guests["a"]; !g.Until.Equal(g.At) {
		t.Errorf("begins until %s", g.Until)
	}
	b.at(b.c.Deadline.Add(-12 * hour)) // no weekend is left
	b.do("start it now, or leave it to the deadline")(b.book(b.now.Add(hour)))
	b.at(b.c.Deadline)
	b.do("the deadline of campaign kernel-1 was")(b.book(b.now.Add(hour)))
}

func TestDeferrals(t *testing.T) {
	b := newBed(t, nil)
	b.do("has nothing booked")(b.defers())
	b.do("")(b.book(saturday(2)))
	b.do("")(b.book(saturday(2)))
	b.is(maint.CampaignBooked, saturday(2), 0)
	b.do("")(b.book(saturday(1))) // earlier is free
	b.is(maint.CampaignBooked, saturday(1), 0)
	b.do("")(b.book(saturday(3)))
	b.is(maint.CampaignBooked, saturday(3), 1)
	if n := campaign.Remaining(b.c, "a"); n != 1 {
		t.Errorf("%d remain", n)
	}
	b.do("")(b.defers())
	b.is(maint.CampaignPending, b.c.Deadline, 2)
	b.do("")(b.book(saturday(2)))
	b.do("allows 2 deferrals")(b.defers())
	b.do("allows 2 deferrals")(b.book(saturday(3)))
	b.do("is not in its windows")(b.book(saturday(3).Add(-hour)))
	b.do("")(b.book(saturday(1)))
	b.is(maint.CampaignBooked, saturday(1), 2)
	if n := campaign.Remaining(b.c, "a"); n != 0 {
		t.Errorf("%d remain", n)
	}
}

func TestStartNow(t *testing.T) {
	b := newBed(t, nil) // a Monday, not in its windows
	b.do("")(b.startNow())
	b.is(maint.CampaignDue, start, 0)
	b.now = b.now.Add(hour)
	b.do("")(b.startNow())
	b.is(maint.CampaignDue, start, 0) // it keeps its place
	b.at(start.Add(day))              // the word holds
	b.is(maint.CampaignDue, start, 0)
	b.do("")(b.defers()) // and can be taken back, which counts
	b.is(maint.CampaignPending, b.c.Deadline, 1)
}

func TestMissedBookingIsLeftToTheDeadline(t *testing.T) {
	b := newBed(t, nil)
	at := saturday(1).Add(2 * hour) // until 13:00: then the work does not fit any more
	b.do("")(b.book(at))
	b.at(at.Add(hour))
	b.is(maint.CampaignDue, at, 0)
	if w := campaign.Wake(b.c); !w.Equal(at.Add(hour + 1)) {
		t.Errorf("wakes at %s", w)
	}
	b.now = at.Add(hour + 1)
	b.do("is not due")(b.begin("op-1"))
	b.at(b.now)
	b.is(maint.CampaignPending, b.c.Deadline, 0)
	b.do("")(b.book(saturday(2))) // picking anew is free
	b.is(maint.CampaignBooked, saturday(2), 0)
	b.at(b.c.Deadline) // the host was down all the time
	b.is(maint.CampaignDue, b.c.Deadline, 0)
}

func TestDeadline(t *testing.T) {
	b := newBed(t, nil)
	b.at(b.c.Deadline.Add(-1))
	b.do("is not due")(b.begin("op-1"))
	b.at(b.c.Deadline)
	b.is(maint.CampaignDue, b.c.Deadline, 0)
	b.do("the deadline")(b.defers())
	b.do("")(b.startNow())
	b.do("")(b.begin("op-1"))
	b.do("")(campaign.Failed(b.now, b.c, "a"))
	b.is(maint.CampaignPending, b.now.Add(campaign.Retry), 0)
	b.do("not running")(campaign.Failed(b.now, b.c, "a"))
	b.do("is not due")(b.begin("op-2"))
	b.at(campaign.Wake(b.c))
	b.do("")(b.begin("op-2"))
}

func TestFailedInTheFirstPhase(t *testing.T) {
	b := newBed(t, nil)
	b.do("")(b.startNow())
	b.do("")(b.begin("op-1"))
	b.do("")(campaign.Failed(b.now, b.c, "a"))
	b.is(maint.CampaignPending, b.c.Deadline, 0)
	if g := b.c.Guests["a"]; g.Op != "op-1" || g.By != "" {
		t.Errorf("got %+v", g)
	}
	b.do("")(b.book(saturday(1)))
	b.is(maint.CampaignBooked, saturday(1), 0)
}

func TestClose(t *testing.T) {
	guests := func(r *campaign.Request) {
		r.Guests = append(r.Guests, campaign.Guest{UUID: "b", Name: "web-2"}, campaign.Guest{UUID: "c", Name: "web-3"}, campaign.Guest{UUID: "d", Name: "web-4"})
	}
	b := newBed(t, guests)
	b.do("")(b.book(saturday(1)))
	for _, uuid := range []string{"b", "c"} {
		b.do("")(campaign.StartNow(b.now, b.c, uuid, "ann"))
		b.do("")(campaign.Begin(b.now, b.c, uuid, maint.OpID("op-"+uuid)))
	}
	b.c = campaign.Close(b.now, b.c)
	b.is(maint.CampaignClosed, time.Time{}, 0)
	if again := campaign.Close(b.now.Add(hour), b.c); !reflect.DeepEqual(again, b.c) {
		t.Errorf("closed again: %+v", again)
	}
	b.do("is closed")(b.startNow())
	b.do("is closed")(b.begin("op-1"))
	b.do("is closed for it")(campaign.Done(b.now, b.c, "a"))
	b.do("is closed")(campaign.Arrive(b.now, b.c, maint.EventGuest{UUID: "e", Name: "web-5"}, nil))
	b.do("")(campaign.Done(b.now, b.c, "b"))
	b.do("")(campaign.Failed(b.now, b.c, "c"))
	b.at(b.c.Deadline.Add(day))
	for uuid, want := range map[string]maint.CampaignState{"a": maint.CampaignClosed, "b": maint.CampaignDone, "c": maint.CampaignClosed, "d": maint.CampaignClosed} {
		if got := b.c.Guests[uuid].State; got != want {
			t.Errorf("%s is %s, want %s", uuid, got, want)
		}
	}
	if due := campaign.Due(b.c); len(due) > 0 {
		t.Errorf("due: %v", due)
	}
}

func TestArrival(t *testing.T) {
	who := maint.EventGuest{UUID: "a", Name: "web-1"}
	booked := maint.GuestCampaign{Guest: "web-1", State: maint.CampaignBooked, At: saturday(1), Until: saturday(1).Add(hour), Defers: 1, By: "ann"}
	due := maint.GuestCampaign{State: maint.CampaignDue, At: start, By: "ann"}
	running := maint.GuestCampaign{State: maint.CampaignRunning, At: start, Op: "op-1"}
	done := maint.GuestCampaign{State: maint.CampaignDone, At: start}
	gone := maint.GuestCampaign{State: maint.CampaignClosed, Defers: 2}
	deadline := start.Add(35 * day)
	stays := maint.GuestCampaign{State: maint.CampaignPending, At: deadline, Defers: 2}
	with := func(g maint.GuestCampaign, change func(*maint.GuestCampaign)) *maint.GuestCampaign {
		change(&g)
		return &g
	}
	for _, c := range []struct {
		name   string
		known  *maint.GuestCampaign
		came   *maint.GuestCampaign
		now    time.Duration // after the start
		state  maint.CampaignState
		at     time.Time
		defers int
	}{
		{"new", nil, nil, 0, maint.CampaignPending, deadline, 0},
		{"new after the deadline: it has its notice", nil, nil, 40 * day, maint.CampaignPending, start.Add(40*day + 15*time.Minute), 0},
		{"known, and came with nothing", &booked, nil, 0, maint.CampaignBooked, saturday(1), 1},
		{"booked elsewhere", nil, &booked, 0, maint.CampaignBooked, saturday(1), 1},
		{"booked elsewhere, fewer deferrals", &stays, &booked, 0, maint.CampaignBooked, saturday(1), 2},
		{"put off elsewhere", &booked, &stays, 0, maint.CampaignPending, deadline, 2},
		{"asked for elsewhere", &booked, &due, 0, maint.CampaignDue, start, 1},
		{"due in the future", nil, with(due, func(g *maint.GuestCampaign) { g.At = saturday(3) }), hour, maint.CampaignDue, start.Add(hour), 0},
		{"done elsewhere", &booked, &done, 0, maint.CampaignDone, start, 1},
		{"done here", &done, &booked, 0, maint.CampaignDone, start, 1},
		{"runs here", &running, &booked, 0, maint.CampaignRunning, start, 1},
		{"done elsewhere, runs here", &running, &done, 0, maint.CampaignDone, start, 0},
		{"called off elsewhere", nil, &gone, 0, maint.CampaignPending, deadline, 2},
		{"booked past the deadline", nil, with(booked, func(g *maint.GuestCampaign) { g.At, g.Until = deadline, deadline }), 0, maint.CampaignPending, deadline, 1},
		{"booked for ever", nil, with(booked, func(g *maint.GuestCampaign) { g.Until = deadline }), 0, maint.CampaignPending, deadline, 1},
		{"pending for ever", nil, with(stays, func(g *maint.GuestCampaign) { g.At = start.AddDate(900, 0, 0) }), 40 * day, maint.CampaignPending, start.Add(40*day + campaign.Retry), 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t, func(r *campaign.Request) { r.Guests[0].UUID = "z" })
			if c.known != nil {
				b.c.Guests["a"] = *c.known
			}
			b.now = start.Add(c.now)
			b.do("")(campaign.Arrive(b.now, b.c, who, c.came))
			b.is(c.state, c.at, c.defers)
		})
	}
	b := newBed(t, nil)
	for want, g := range map[string]maint.GuestCampaign{
		"-1 deferrals": {State: maint.CampaignPending, Defers: -1},
		`no state ""`:  {},
		"no operation": {State: maint.CampaignRunning},
	} {
		b.do(want)(campaign.Arrive(b.now, b.c, who, &g))
	}
	b.do("no UUID")(campaign.Arrive(b.now, b.c, maint.EventGuest{Name: "web-9"}, nil))
}

func TestRemove(t *testing.T) {
	b := newBed(t, func(r *campaign.Request) { r.Guests = append(r.Guests, campaign.Guest{UUID: "b", Name: "web-2"}) })
	b.do("")(campaign.Done(b.now, b.c, "b"))
	if !b.c.Closed.IsZero() {
		t.Fatal("closed with a guest undone")
	}
	b.c = campaign.Remove(b.now, b.c, "a")
	if len(b.c.Guests) != 1 || !b.c.Closed.Equal(b.now) {
		t.Errorf("got %+v", b.c)
	}
}

func TestDueInOrder(t *testing.T) {
	b := newBed(t, func(r *campaign.Request) {
		for _, uuid := range []string{"d", "c", "b"} {
			r.Guests = append(r.Guests, campaign.Guest{UUID: uuid, Name: uuid})
		}
	})
	b.do("")(campaign.StartNow(b.now.Add(hour), b.c, "d", "ann"))
	b.do("")(campaign.StartNow(b.now.Add(2*hour), b.c, "c", "ann"))
	b.at(b.c.Deadline)
	if got := strings.Join(campaign.Due(b.c), " "); got != "d c a b" {
		t.Errorf("due: %s", got)
	}
}

// A campaign that a guest brings and that Create would have refused is no campaign
// here: its operations could never begin, or its deadline never come.
func TestArriveInNoCampaign(t *testing.T) {
	for name, spoil := range map[string]func(*maint.Campaign){
		"no ID":                func(c *maint.Campaign) { c.ID = "" },
		"an ID that is a path": func(c *maint.Campaign) { c.ID = "../x" },
		"no such impact":       func(c *maint.Campaign) { c.Impact = "Explode" },
		"a negative duration":  func(c *maint.Campaign) { c.Duration = -hour },
		"deferrals without end": func(c *maint.Campaign) {
			c.MaxDefers = 1 << 30
		},
		"two lines":        func(c *maint.Campaign) { c.Description = "a\nb" },
		"a long text":      func(c *maint.Campaign) { c.Description = strings.Repeat("x", 1<<20) },
		"no deadline ever": func(c *maint.Campaign) { c.Deadline = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC) },
		"a year not in JSON": func(c *maint.Campaign) {
			c.Deadline = time.Date(9999, 12, 31, 23, 59, 59, 0, time.FixedZone("", -23*3600))
		},
	} {
		b := newBed(t, nil)
		came := b.c.Guests["a"]
		spoil(&b.c)
		if c, err := campaign.Arrive(b.now, b.c, maint.EventGuest{UUID: "b", Name: "web-2"}, &came); err == nil {
			t.Errorf("%s: taken over: %+v", name, c)
		}
	}
}
