package hypervisor

import (
	"context"
	"slices"
	"strings"
	"sync"
)

// unanswered keeps account of calls that were sent and not answered yet, by
// guest. The zero value is ready.
type unanswered struct {
	mu    sync.Mutex
	calls map[string][]chan struct{} // closed when answered; by UUID without hyphens
}

func bare(uuid string) string { return strings.ToLower(strings.ReplaceAll(uuid, "-", "")) }

// begin notes a call, until over is called.
func (u *unanswered) begin(uuid string) (over func()) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.calls == nil {
		u.calls = make(map[string][]chan struct{})
	}
	key, call := bare(uuid), make(chan struct{})
	u.calls[key] = append(u.calls[key], call)
	return func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		close(call)
		left := slices.DeleteFunc(u.calls[key], func(c chan struct{}) bool { return c == call })
		if u.calls[key] = left; len(left) == 0 {
			delete(u.calls, key)
		}
	}
}

// wait returns when the calls that were noted are answered.
func (u *unanswered) wait(ctx context.Context, uuid string) error {
	u.mu.Lock()
	calls := slices.Clone(u.calls[bare(uuid)])
	u.mu.Unlock()
	for _, call := range calls {
		select {
		case <-call:
		case <-ctx.Done():
			return gaveUp("DomainSuspend", "an earlier call", context.Cause(ctx))
		}
	}
	return nil
}
