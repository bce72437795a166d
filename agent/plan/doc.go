// Package plan makes plans: which rung of the ladder serves each guest when its host is
// updated. It is a pure function of the update, what is known of the host and its guests,
// their policies, what has been felt before, and the time; the same of them give the same
// bytes.
//
// # What is decided
//
// First, by which rung each change is delivered to guests that stay. No change has more
// than one candidate, so that nothing is to be weighed:
//
//	A     if it can be delivered so, and this host can: nobody feels it
//	B3    if this or another change needs a boot: one pause is for all of them
//	B1    a component      } whichever the change's kind has
//	B2    QEMU             }
//	D     nothing else: no guest can stay
//
// A change that this host can do by none of them is a blocker of the plan.
//
// Then, for each guest, whether it stays and feels that, or moves away first. Both must be
// possible (verdicts) and allowed (its policy). Least impact is, in this order:
//
//  1. fewest guests that nothing serves, those of higher priority counting first
//  2. least of the sum of their levels: 0 nothing is felt, 1 what the guest's policy
//     prefers, else B, 2 the other, and two more if its owner is to be asked
//  3. least of the sum of their predicted standstills
//
// Guests that would stay rather than move stay, as that takes nothing from anybody. The
// others compete for room on peers. They are given it by branch and bound, which is exact
// until its budget of steps is used up; before it some ways of filling the peers are tried,
// and one of them that gives every guest its best is not improved on.
//
// Last, when: nobody before its notice has passed, nor outside its windows. Those that are
// held together are held at the first moment that suits all. Who has no such moment, or is
// asked and does not answer, is served at the deadline.
package plan
