package journal

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"

	"belay/agent/maint"
)

// foldDisks takes over what is made for disks on their way here: the last record of an
// operation says how it is.
func (j *Journal) foldDisks(r maint.Record) error {
	var made maint.MadeDisks
	if err := json.Unmarshal(r.Data, &made); err != nil {
		return fmt.Errorf("disks of %s: %w", r.Op, err)
	}
	if !made.State.Open() {
		delete(j.disks, r.Op)
		return nil
	}
	j.disks[r.Op] = made
	return nil
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
