package views

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"belay/agent/maint"
	"belay/notify"
)

const (
	guestA = "aaaaaaaa-0000-4000-8000-000000000001"
	guestB = "bbbbbbbb-0000-4000-8000-000000000002"
	eventA = maint.EventID("a1111111-0000-4000-8000-00000000000a")
	eventB = maint.EventID("b2222222-0000-4000-8000-00000000000b")
)

// world is a source in memory. What was done is noted as "GUEST VERB ARGUMENTS".
type world struct {
	mu     sync.Mutex
	guests map[string]*guestWorld
	done   []string
	fail   error // what the next thing to do ends with
}

type guestWorld struct {
	instance  notify.Instance
	doc       notify.Document
	changed   chan struct{}
	history   []maint.ScheduledEvent
	campaigns []maint.Campaign
}

// newWorld has two guests of two owners, without events.
func newWorld() *world {
	guest := func(uuid, name, mac, ip string) *guestWorld {
		return &guestWorld{
			instance: notify.Instance{Name: name, UUID: uuid, Interfaces: []notify.Interface{{
				MAC: mac, Addrs: []netip.Addr{netip.MustParseAddr("fe80::1"), netip.MustParseAddr(ip)},
			}}},
			doc: notify.Document{Incarnation: 1}, changed: make(chan struct{}),
		}
	}
	return &world{guests: map[string]*guestWorld{
		guestA: guest(guestA, "web-1", "52:54:00:aa:aa:aa", "10.0.0.1"),
		guestB: guest(guestB, "other-9", "52:54:00:bb:bb:bb", "10.9.9.9"),
	}}
}

// show gives a guest other events.
func (w *world) show(guest string, events ...maint.ScheduledEvent) {
	w.mu.Lock()
	defer w.mu.Unlock()
	g := w.guests[guest]
	g.doc = notify.Document{Incarnation: g.doc.Incarnation + 1, Events: events}
	close(g.changed)
	g.changed = make(chan struct{})
}

func (w *world) of(guest string) guestWorld {
	w.mu.Lock()
	defer w.mu.Unlock()
	if g := w.guests[guest]; g != nil {
		return *g
	}
	return guestWorld{}
}

func (w *world) Document(guest string) (notify.Document, <-chan struct{}) {
	g := w.of(guest)
	return g.doc, g.changed
}

func (w *world) Instance(guest string) (notify.Instance, bool) {
	i := w.of(guest).instance
	return i, i.UUID != ""
}

func (w *world) History(guest string) []maint.ScheduledEvent { return w.of(guest).history }
func (w *world) Maintenance(guest string) []maint.Campaign   { return w.of(guest).campaigns }

func (w *world) note(format string, args ...any) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.fail != nil {
		return w.fail
	}
	w.done = append(w.done, fmt.Sprintf(format, args...))
	return nil
}

func (w *world) knows(guest string, id maint.EventID) bool {
	g := w.of(guest)
	return slices.ContainsFunc(slices.Concat(g.doc.Events, g.history), func(e maint.ScheduledEvent) bool { return e.ID == id })
}

func (w *world) Approve(_ context.Context, guest string, id maint.EventID) error {
	if !w.knows(guest, id) {
		return fmt.Errorf("cannot approve: %w", maint.ErrUnknownEvent)
	}
	return w.note("%s approve %s", guest, id)
}

func (w *world) Listen(_ context.Context, guest string, l maint.Listener) error {
	return w.note("%s listen %s %v", guest, l.Name, l.Timeout)
}

func (w *world) Unlisten(_ context.Context, guest, name string) error {
	return w.note("%s unlisten %s", guest, name)
}

func (w *world) Ready(_ context.Context, guest, name string, id maint.EventID) error {
	if !w.knows(guest, id) {
		return maint.ErrUnknownEvent
	}
	return w.note("%s ready %s %s", guest, name, id)
}

func (w *world) campaign(guest string, id maint.CampaignID) error {
	if !slices.ContainsFunc(w.of(guest).campaigns, func(c maint.Campaign) bool { return c.ID == id }) {
		return maint.Problemf(maint.CodeNotFound, "campaign", "give one that is listed", "is not one of the guest's")
	}
	return nil
}

func (w *world) Book(_ context.Context, guest string, id maint.CampaignID, at time.Time) error {
	if err := w.campaign(guest, id); err != nil {
		return err
	}
	if at.IsZero() {
		return w.note("%s start %s", guest, id)
	}
	return w.note("%s book %s %s", guest, id, at.Format(time.RFC3339))
}

func (w *world) Defer(_ context.Context, guest string, id maint.CampaignID) error {
	if err := w.campaign(guest, id); err != nil {
		return err
	}
	return w.note("%s defer %s", guest, id)
}

var noon = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// freeze is an event of guest A.
func freeze() maint.ScheduledEvent {
	return maint.ScheduledEvent{
		ID: eventA, Impact: maint.ImpactFreeze, State: maint.EventScheduled, Source: maint.SourcePlatform,
		Guests:      []maint.EventGuest{{UUID: guestA, Name: "web-1"}},
		Description: `new <kernel> & "friends"`, Duration: 2500 * time.Millisecond,
		Announced: noon.Add(-15 * time.Minute), NotBefore: noon.In(time.FixedZone("", 3600)),
	}
}

// with is an event with another impact.
func with(e maint.ScheduledEvent, i maint.Impact) maint.ScheduledEvent {
	e.Impact = i
	return e
}

func started(e maint.ScheduledEvent) maint.ScheduledEvent {
	e.State, e.Started = maint.EventStarted, noon.Add(time.Minute)
	return e
}

// generous are limits that tests about something else do not meet.
func generous() Limits {
	many := Rate{PerSecond: 1e9, Burst: 1e9}
	return Limits{Get: many, Post: many, Poll: many, Keep: many}
}

func handler(t testing.TB, w *world, change ...func(*Config)) *Handler {
	t.Helper()
	cfg := Config{Source: w, Limits: generous(), Log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	for _, f := range change {
		f(&cfg)
	}
	return New(cfg)
}

// ask is a request of guest A; headers are "Name: value".
func request(method, target, body string, headers ...string) *http.Request {
	r := httptest.NewRequest(method, target, strings.NewReader(body))
	r.Host = notify.Address
	for _, line := range headers {
		name, value, _ := strings.Cut(line, ": ")
		r.Header.Add(name, value)
	}
	return r.WithContext(notify.WithGuest(r.Context(), guestA))
}

func serve(h http.Handler, r *http.Request) *http.Response {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Result()
}

func ask(h http.Handler, method, target, body string, headers ...string) *http.Response {
	return serve(h, request(method, target, body, headers...))
}

func bodyOf(t rapid.TB, r *http.Response) string {
	t.Helper()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// want checks an answer: its status, and its body if that is not "*".
func want(t testing.TB, r *http.Response, status int, body string) {
	t.Helper()
	got := bodyOf(t, r)
	if r.StatusCode != status || body != "*" && got != body {
		t.Errorf("answered %d %q, want %d %q", r.StatusCode, got, status, body)
	}
}

// keys are the names of the fields of a JSON object, in order.
func keys(t testing.TB, object json.RawMessage) []string {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal(object, &m); err != nil {
		t.Fatal(err)
	}
	return slices.Sorted(maps.Keys(m))
}

var errDisk = errors.New("the disk of other-9 is full")
