package main

import (
	"context"
	"fmt"
	"io"

	"belay/agent/maint"
)

// why says where guests could be moved to; "" is for all of them, or all peers.
func (a *app) why(ctx context.Context, guest, to string) error {
	vs, err := a.client().Moves(ctx, guest, to)
	if err != nil {
		return err
	}
	return a.print(vs, func(w io.Writer) { printVerdicts(w, vs) })
}

// printVerdicts prints where guests could be moved to, with each reason against and
// its remedy.
func printVerdicts(w io.Writer, vs []maint.MoveVerdict) {
	row(w, "GUEST", "TO", "VERDICT")
	for _, v := range vs {
		verdict := "can move"
		switch {
		case v.CanMove && len(v.Copies) > 0:
			verdict = "can move, with its disks copied: " + copied(v.Copies)
		case len(v.Copies) > 0:
			verdict = "can move with --copy-disks: " + copied(v.Copies) + "; without:"
		case !v.CanMove:
			verdict = fmt.Sprintf("cannot move: %s", count(len(v.Problems), "reason"))
		}
		row(w, v.Guest, v.Peer, verdict)
		for _, p := range v.Problems {
			row(w, "", "", "- "+p.Subject+": "+p.Reason)
			if p.Remedy != "" {
				row(w, "", "", "  → "+p.Remedy)
			}
		}
	}
}

// count writes how many there are of something.
func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
