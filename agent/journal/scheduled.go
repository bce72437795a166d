package journal

import (
	"encoding/json"
	"maps"
	"slices"
	"time"

	"belay/agent/maint"
)

// Scheduled returns what the journal has of scheduled events.
func (j *Journal) Scheduled() maint.Scheduled {
	j.mu.Lock()
	defer j.mu.Unlock()
	return maint.Scheduled{Events: maps.Clone(j.scheduled.Events), Incarnations: maps.Clone(j.scheduled.Incarnations),
		Listeners: maps.Clone(j.scheduled.Listeners), Campaigns: maps.Clone(j.scheduled.Campaigns)}
}

// foldScheduled applies a record about scheduled events.
func (j *Journal) foldScheduled(r maint.Record) error {
	var c maint.EventChange
	if err := json.Unmarshal(r.Data, &c); err != nil {
		return err
	}
	j.scheduled.Fold(c)
	return nil
}

// eventsApart is for how long each change of scheduled events is kept by itself.
const eventsApart = time.Hour

// compaction makes one record of all those about scheduled events that are older
// than a moment, without what ended before another.
type compaction struct {
	ended  time.Time
	before time.Time
	state  maint.Scheduled // the fold of the old ones
	old    []uint64        // their numbers
	last   maint.Record    // the last of them
	done   bool            // one that is not old was met: what follows it is not either
}

func newCompaction(ended, before time.Time) *compaction {
	if ended.After(before) {
		before = ended
	}
	return &compaction{ended: ended, before: before, state: maint.NewScheduled()}
}

// add takes the next record.
func (c *compaction) add(r maint.Record) error {
	if c.done = c.done || !r.Time.Before(c.before); c.done {
		return nil
	}
	var change maint.EventChange
	if err := json.Unmarshal(r.Data, &change); err != nil {
		return err
	}
	c.state.Fold(change)
	c.old, c.last = append(c.old, r.Seq), r
	return nil
}

// record is what takes the place of the old ones, under the number of the last;
// false: nothing is left to tell.
func (c *compaction) record() (r maint.Record, there bool, err error) {
	if len(c.old) == 0 {
		return r, false, nil
	}
	c.state.Forget(c.ended)
	change := maint.EventChange{Events: slices.Collect(maps.Values(c.state.Events)), Incarnations: c.state.Incarnations,
		Listeners: c.state.Listeners, Campaigns: slices.Collect(maps.Values(c.state.Campaigns))}
	r = c.last
	r.Data, err = json.Marshal(change)
	return r, !change.Empty(), err
}
