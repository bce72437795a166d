// Package campaign decides what happens when in maintenance for which owners pick
// the moment (maint.Campaign). It does nothing itself: each function is given the
// time and a campaign and returns the changed campaign, or the reason why not, a
// *maint.Problem or *maint.Refusal, and an unchanged one. The caller keeps them.
//
//	Create                          a campaign, if every guest has a moment for it
//	Book, StartNow, Defer           what owners do, in the first phase
//	Advance, Due, Wake              what time does
//	Begin, Done, Failed             what becomes of a guest
//	Arrive, Remove                  guests that come, and that are gone for good
//	Close                           calls it off
//	Fits, Partition, NotBefore      what may be started on whose approval
//
// A guest's way through a campaign:
//
//	         Book             At has come         Begin            Done
//	pending ───────► booked ─────────────► due ─────────► running ───────► done
//	  ▲  │              │                  ▲ │               │
//	  │  └──────────────┼──────────────────┘ │               │
//	  │  StartNow, deadline                  │               │
//	  └─────────────────┴────────────────────┴───────────────┘
//	               Defer, missed                  Failed
//
//	pending, booked, due ──► closed     Close
//	running ──► done, closed            after Close: as the operation ends
//
// # The owner's moment
//
// A booking is its owner's approval and needs no notice. It is for a moment in the
// guest's windows, with room for the work before the window and the first phase
// end. If it cannot begin within two hours, or there is no room for it any more, say
// because the host was down, it is missed: it is not begun at a moment that the owner
// did not pick. Whoever says now means now: windows do not hold that up.
//
// Each time that a moment is put later counts as a deferral, by Defer as by Book.
// Picking an earlier one is free, and so is picking anew what was missed or failed.
//
// # The deadline
//
// Silence is consent. At the deadline what has not begun is due, and nothing that
// owners can do holds it up. What fails after it is tried again after a while.
//
// No guest's moment depends on another's: whoever is early is so for himself alone.
package campaign
