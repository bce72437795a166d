package evacuate

import "belay/agent/maint"

// Next gives those of the planned moves that may begin now, in their order: no more
// than atOnce are on their way together, and no more than perPeer says to, or from,
// one peer, of which a peer that it does not name has one.
func Next(moves []maint.GuestMove, atOnce int, perPeer map[string]int) (next []maint.GuestMove) {
	moving, at := 0, make(map[string]int)
	for _, m := range moves {
		if m.State == maint.MoveMoving {
			moving++
			at[m.Peer]++
		}
	}
	for _, m := range moves {
		most, known := perPeer[m.Peer]
		if !known {
			most = 1
		}
		if m.State != maint.MovePlanned || moving >= atOnce || at[m.Peer] >= most {
			continue
		}
		moving++
		at[m.Peer]++
		next = append(next, m)
	}
	return next
}
