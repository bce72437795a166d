package agent

import (
	"context"
	"errors"
	"testing"

	"belay/agent/maint"
)

// has is a host of which only its guests are asked.
type has struct {
	Hypervisor
	err error
}

func (h has) Guest(context.Context, string) (maint.Guest, error) { return maint.Guest{}, h.err }

// A peer that says that a guest has come back is believed only where it has.
func TestGuestIsNotBackByWord(t *testing.T) {
	t.Parallel()
	m := maint.GuestMove{Guest: "web-1", GuestUUID: "u", Peer: "b"}
	for _, c := range []struct {
		err       error
		was, want maint.Outcome
	}{
		{nil, maint.OutcomeDone, maint.OutcomeDone},
		{maint.ErrNoGuest, maint.OutcomeDone, maint.OutcomeStuck},
		{maint.ErrNoGuest, maint.OutcomePartly, maint.OutcomeStuck},
		{maint.ErrNoGuest, maint.OutcomeFailed, maint.OutcomeFailed},
		{errors.New("libvirt is away"), maint.OutcomeDone, maint.OutcomeDone},
	} {
		a := &Agent{hyp: has{err: c.err}}
		op := a.seeReturned(t.Context(), m, maint.Op{Outcome: c.was})
		if op.Outcome != c.want || (c.want != c.was) != (len(op.Problems) == 1) {
			t.Errorf("%v, %v: %v, %v", c.err, c.was, op.Outcome, op.Problems)
		}
	}
}
