// Package evacuate plans how the guests of a host are moved to its peers.
//
// It does no I/O: what peers have room for, and why a guest cannot go to one, is
// given to it. Place says where each guest goes, or why nowhere. Guests that go to one
// peer share its room, and no two guests of an anti-affinity group are on one peer.
// Next says which of them may begin, the biggest first, within the limits of how many
// may be on their way at once. The same is planned of the same, whatever the order
// in which it is told.
package evacuate
