// Package scratchtest has what the phases of an operation note and save be kept in memory, for tests of
// packages with such phases.
package scratchtest

import (
	"encoding/json"
	"fmt"
)

// Notebook is a Scratch, as those packages have it. It outlives the belayds that use it.
type Notebook struct {
	Phase string // that is at work
	Notes []string
	Saved map[string][]byte // by phase
}

// New is an empty one.
func New() *Notebook { return &Notebook{Saved: make(map[string][]byte)} }

// Note implements Scratch.
func (n *Notebook) Note(format string, args ...any) error {
	n.Notes = append(n.Notes, fmt.Sprintf(format, args...))
	return nil
}

// Save implements Scratch.
func (n *Notebook) Save(v any) (err error) {
	n.Saved[n.Phase], err = json.Marshal(v)
	return err
}

// Load implements Scratch.
func (n *Notebook) Load(phase string, v any) (bool, error) {
	b, ok := n.Saved[phase]
	if !ok {
		return false, nil
	}
	return true, json.Unmarshal(b, v)
}
