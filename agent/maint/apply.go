package maint

import (
	"fmt"
	"strings"
)

// ApplyRequest asks for a plan to be carried out.
type ApplyRequest struct {
	Plan   Plan   `json:"plan"`
	Reason string `json:"reason,omitempty"`
}

// StepOp names the operation that does a step of an apply, before it is begun: whoever
// takes the apply up again finds it by that name, or knows that it never began.
func StepOp(apply OpID, step int) OpID { return OpID(fmt.Sprintf("%s-step%d", apply, step)) }

// UndoOp names the operation that takes a step of an apply back, the first one or a later
// try.
func UndoOp(apply OpID, step, try int) OpID {
	return OpID(fmt.Sprintf("%s-undo%d", StepOp(apply, step), try))
}

// ApplyOf is the apply that an operation is a step of, by its name.
func ApplyOf(id OpID) (apply OpID, is bool) {
	if i := strings.LastIndex(string(id), "-step"); i > 0 {
		return id[:i], true
	}
	return "", false
}
