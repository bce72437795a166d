// Package migrate is rung D: it moves one running guest to one peer host.
//
// A migration is read down one column. The contract of every phase: on
// failure the guest runs where it ran before.
//
//	preflight  ask both hosts; list every problem at once; change nothing
//	reserve    the peer keeps room                      undo: give it up
//	perform    copy, switch over, look at both hosts    undo: cancel the copy
//	─────────  point of no return: the guest runs on the peer
//	verify     exactly one running copy; definition and autostart settled
//	finish     give up the reservation, write down what was measured
//
// Whether a copy comes to its end is for convergence to see to: it starts with a short
// pause, raises it as what the guest writes demands, and then does what the operator
// has allowed.
//
// What happened is never concluded from an error code: Reconcile has what both hosts
// show and what the journal says, and names the state and the one action that is safe.
// Nothing here can destroy, stop or restart a guest; the interfaces it is given have no
// such call. A guest that a switch-over has left stopped is started again only where the
// other side is proven not to run it.
package migrate
