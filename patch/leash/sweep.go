package leash

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"belay/agent/maint"
)

// Sweep discards what leashes have left behind whose operations nobody will take
// up again; keep tells those that somebody will. What belongs to a leash that
// lives stays, as does what may still hold a guest, which is an error beside the
// others.
//
// Left are notes, where a leash had to see to its guests by itself; and lock and
// socket alone, where it was killed before it had an order.
func Sweep(dir string, keep func(op maint.OpID) bool) (swept []Status, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("cannot look for what leashes have left: %w", err)
	}
	var ops []maint.OpID
	for _, e := range entries {
		for _, ext := range files {
			if name, ours := strings.CutSuffix(e.Name(), ext); ours && checkOp(maint.OpID(name)) == nil {
				ops = append(ops, maint.OpID(name))
				break
			}
		}
	}
	slices.Sort(ops)
	var errs []error
	for _, op := range slices.Compact(ops) {
		if keep(op) {
			continue
		}
		was := Status{Op: op}
		if s, err := readNotes(dir, op); err == nil {
			was = *s
		}
		switch err := Discard(dir, op); {
		case err == nil:
			swept = append(swept, was)
		case !errors.Is(err, errClaimed):
			errs = append(errs, err)
		}
	}
	return swept, errors.Join(errs...)
}
