// Package preserve is rung B1: it holds guests (their vCPUs stopped, their
// memory kept in RAM) while something is done to the host, and releases them.
//
//	Preflight   who is to be held, can the step run, are file systems frozen
//	Perform     prepare the step ─► arm the leash ─► pause ─┐
//	               ┌────────────────────────────────────────┘
//	               └► step ─► verify ─► release ─► clocks
//	                   │ failed: undo ────┘
//	Recover     the same way out, for a belayd that died within Perform
//
// Nothing is written to disk between the first pause and the last release: the
// step may be about the very disk. What a belayd that died there left behind is
// known from the order, saved before, and from the leash, which has its notes
// in RAM.
package preserve
