package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"belay/agent/maint"
)

// Cordon has the host take no guests in. One that is cordoned already stays so, for
// the new reason if there is one.
func (a *Agent) Cordon(_ context.Context, by, reason string) (maint.Cordon, error) {
	if err := checkReason(reason); err != nil {
		return maint.Cordon{}, err
	}
	a.arrivals.Lock() // nobody is promised room meanwhile
	defer a.arrivals.Unlock()
	if c := a.journal.Cordon(); c != nil && (reason == "" || reason == c.Reason) {
		return *c, nil
	}
	c := maint.Cordon{Since: time.Now().Round(0), By: by, Reason: reason}
	data, err := json.Marshal(c)
	if err != nil {
		return c, err
	}
	return c, a.append(maint.Record{Kind: maint.RecCordoned, By: by, Text: reason, Data: data})
}

// Uncordon has the host take guests in again, unless it is being emptied.
func (a *Agent) Uncordon(_ context.Context, by string) error {
	for _, op := range a.journal.Ops() {
		if op.Kind == maint.OpDrain && op.State != maint.OpEnded {
			return refuse("cannot uncordon host "+a.cfg.Host, maint.Problemf(maint.CodeBusy, "host "+a.cfg.Host,
				fmt.Sprintf("abort it (belay ops abort %s), which lifts its cordon", op.ID), "is being drained by operation %s", op.ID))
		}
	}
	return a.uncordon(by)
}

func (a *Agent) uncordon(by string) error {
	a.arrivals.Lock()
	defer a.arrivals.Unlock()
	if a.journal.Cordon() == nil {
		return nil
	}
	return a.append(maint.Record{Kind: maint.RecUncordoned, By: by})
}
