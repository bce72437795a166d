package journal

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"belay/agent/maint"
)

// Reservations returns the room kept for arriving guests, lapsed ones left out.
func (j *Journal) Reservations(now time.Time) []maint.Reservation {
	j.mu.Lock()
	defer j.mu.Unlock()
	var all []maint.Reservation
	for _, r := range j.reserved {
		if r.Expires.After(now) {
			all = append(all, r)
		}
	}
	slices.SortFunc(all, func(a, b maint.Reservation) int { return cmp.Compare(a.Op, b.Op) })
	return all
}

// Reservation returns the room kept for operation id, also when it has lapsed
// but was not given up.
func (j *Journal) Reservation(id maint.OpID) (maint.Reservation, bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	r, ok := j.reserved[id]
	return r, ok
}

// Arrivals returns the guests that have come here, oldest first.
func (j *Journal) Arrivals() []maint.Arrived {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.SortedFunc(maps.Values(j.arrived), func(a, b maint.Arrived) int {
		return cmp.Or(a.At.Compare(b.At), cmp.Compare(a.Op, b.Op))
	})
}

// Arrival returns the guest that has come here by operation id.
func (j *Journal) Arrival(id maint.OpID) (maint.Arrived, bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	a, ok := j.arrived[id]
	return a, ok
}

// foldDisks takes over what is made for disks on their way here: the last record of an
// operation says how it is.
func (j *Journal) foldDisks(r maint.Record) error {
	made, err := readDisks(r)
	if err != nil {
		return err
	}
	if !made.State.Open() {
		delete(j.disks, r.Op)
		return nil
	}
	j.disks[r.Op] = made
	return nil
}

// readDisks refuses a state that it does not know: files would be forgotten.
func readDisks(r maint.Record) (made maint.MadeDisks, err error) {
	if err := json.Unmarshal(r.Data, &made); err != nil {
		return made, fmt.Errorf("disks of %s: %w", r.Op, err)
	}
	if !made.State.Open() && made.State != maint.DisksKept && made.State != maint.DisksGone {
		return made, fmt.Errorf("disks of %s: unknown state %q", r.Op, made.State)
	}
	return made, nil
}

// Disks returns the files that were made for disks and of which it is still to be seen
// what becomes of them.
func (j *Journal) Disks() []maint.MadeDisks {
	j.mu.Lock()
	defer j.mu.Unlock()
	var all []maint.MadeDisks
	for _, m := range j.disks {
		m.Files = slices.Clone(m.Files)
		all = append(all, m)
	}
	slices.SortFunc(all, func(a, b maint.MadeDisks) int { return cmp.Compare(a.Op, b.Op) })
	return all
}
