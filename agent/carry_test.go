package agent

import (
	"context"
	"encoding/json"
	"log/slog"
	"testing"
	"time"

	"belay/agent/config"
	"belay/agent/journal"
	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
	"belay/migrate"
)

// older is a destination that knows nothing of events and needs, and is strict.
type older struct {
	migrate.Destination
	settled, checked, reserved int
}

func (o *older) Check(_ context.Context, r maint.Arrival) ([]maint.Problem, error) {
	if r.Needs != nil || r.Way != nil {
		return nil, maint.Problemf(maint.CodeBadRequest, "body", "", `unknown field "needs"`)
	}
	o.checked++
	return []maint.Problem{{Code: maint.CodeCPU}}, nil
}

func (o *older) Reserve(_ context.Context, r maint.Arrival) (maint.Landing, error) {
	if r.Way != nil {
		return maint.Landing{}, maint.Problemf(maint.CodeBadRequest, "body", "", `unknown field "way"`)
	}
	o.reserved++
	return maint.Landing{}, nil
}

func (o *older) Settle(_ context.Context, s maint.Settlement) error {
	if s.Events != nil {
		return maint.Problemf(maint.CodeBadRequest, "body", "", `unknown field "events"`)
	}
	o.settled++
	return nil
}

// A guest is checked and settled on a host whose belayd is older, without its needs
// and its events.
func TestOlderHost(t *testing.T) {
	w := hypervisortest.NewWorld()
	defer w.Close()
	j, err := journal.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	a := New(config.Config{Host: "a"}, "test", w.AddHost("a", hypervisortest.HostOptions{}), j, Preserve{}, nil, slog.New(slog.DiscardHandler))
	if err := a.keeper.Listen(t.Context(), "u", maint.Listener{Name: "db", Timeout: 1}); err != nil {
		t.Fatal(err)
	}
	to := &older{}
	if err := (carrying{to, a}).Settle(t.Context(), maint.Settlement{Op: "mig-1", GuestUUID: "u"}); err != nil || to.settled != 1 {
		t.Errorf("%v, settled %d times", err, to.settled)
	}
	ps, err := carrying{to, a}.Check(t.Context(), maint.Arrival{Op: "mig-1", Needs: &maint.Needs{SwTPM: true}})
	if err != nil || len(ps) != 1 || to.checked != 1 {
		t.Errorf("%v, %v, checked %d times", ps, err, to.checked)
	}
	way := maint.Arrival{Op: "mig-1", Way: &maint.Way{TLS: true}}
	if _, err := (carrying{to, a}).Check(t.Context(), way); err != nil || to.checked != 2 {
		t.Errorf("%v, checked %d times", err, to.checked)
	}
	if _, err := (carrying{to, a}).Reserve(t.Context(), way); err != nil || to.reserved != 1 {
		t.Errorf("%v, reserved %d times", err, to.reserved)
	}
}

// A guest that comes back without an event of an operation of this host does not find
// the number under which another host has shown it that.
func TestArrivesWithoutOwnEvents(t *testing.T) {
	w := hypervisortest.NewWorld()
	defer w.Close()
	j, err := journal.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	op, err := json.Marshal(maint.Op{ID: "hold-1", Kind: maint.OpHold})
	if err != nil {
		t.Fatal(err)
	}
	if err := j.Append(maint.Record{Kind: maint.RecAccepted, Op: "hold-1", Data: op}); err != nil {
		t.Fatal(err)
	}
	a := New(config.Config{Host: "a"}, "test", w.AddHost("a", hypervisortest.HostOptions{}), j, Preserve{}, nil, slog.New(slog.DiscardHandler))
	events := &maint.GuestEvents{UUID: "u", Incarnation: 7, Events: []maint.ScheduledEvent{{ID: "e", Impact: maint.ImpactFreeze, State: maint.EventScheduled,
		Op: "hold-1", Guests: []maint.EventGuest{{UUID: "u", Name: "web-1"}}, Announced: time.Now()}}}
	if err := a.adopt(t.Context(), maint.Settlement{Op: "mig-1", GuestUUID: "u", Events: events}); err != nil {
		t.Fatal(err)
	}
	if d, _ := a.keeper.Document("u"); len(d.Events) > 0 || d.Incarnation == events.Incarnation {
		t.Errorf("it is shown %+v, and knows %d with an event", d, events.Incarnation)
	}
}
