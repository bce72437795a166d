package agent

import (
	"context"
	"log/slog"
	"testing"

	"belay/agent/config"
	"belay/agent/journal"
	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
	"belay/migrate"
)

// older is a destination that knows nothing of events, and is strict.
type older struct {
	migrate.Destination
	settled int
}

func (o *older) Settle(_ context.Context, s maint.Settlement) error {
	if s.Events != nil {
		return maint.Problemf(maint.CodeBadRequest, "body", "", `unknown field "events"`)
	}
	o.settled++
	return nil
}

// A guest is settled on a host whose belayd is older, without its events.
func TestSettleOnOlderHost(t *testing.T) {
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
}
