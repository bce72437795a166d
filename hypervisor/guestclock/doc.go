// Package guestclock measures guests' wall clocks against the host's, with error
// bars, and puts those right that a pause has left behind.
//
// A guest whose vCPUs were stopped goes on where it was: its wall clock has lost
// the pause (QEMU resumes the guest's clocks at the values they were saved with).
// Nothing but the guest agent can tell it the time.
//
//	Prepare ─► the guest is held ─► released ─► Correct
//	   │                                          │
//	   │ agent? frozen? Windows?                  │ set ─► measure ─► set again, four times at most
//	   '─ offset, round trip                      '─ how far off now, how long it ran with a wrong clock
//
//	Measure, Sync      at any time
//
// # Measuring
//
// The agent is asked for the time. Its answer was right at some moment between
// question and reply, so each one bounds the guest's offset from both sides, and
// several bound it better: what is given is the middle of what all of them allow,
// and the error is half of its width. The error is thus never more than half the
// shortest round trip. Host times are taken from a clock that nobody sets, with
// the wall clock's reading at one moment: a host clock that is stepped meanwhile
// does no harm.
//
// # Setting
//
// guest-set-time has the guest call settimeofday(2) at once and then run hwclock
// -w, and only then answer. util-linux's hwclock turns in a loop until the next
// half second, so an answer takes up to one second whose end says nothing about
// the clock, and whatever is asked meanwhile waits. QEMU's agent reports a
// failure when hwclock fails although the clock was set, and one when there is no
// hwclock and nothing was set. Therefore no result is believed: after each
// setting the clock is measured. That also tells when the setting took effect: the
// guest's clock read the value that was sent when the host's read that value less
// the guest's offset since.
//
// The value sent is the host's time and an estimate of the way to the guest: half
// a round trip at first.
//
// # Many guests
//
// A setting keeps a connection and one of libvirtd's workers until hwclock is done.
// So only as many clocks are set in a second as calls may be under way (New), and
// libvirtd has workers (max_workers, 20 by default): of a host's guests the first so
// many are right some ten milliseconds after their release, the next a second later,
// and so on. libvirtd begins with few workers (min_workers, 5); a call that waits for
// one carries a time that grows old, which the next setting makes good.
//
// # What is not done
//
// No clock is stepped back: the guest's programs would see time repeat itself. A
// guest whose clock was off on purpose stays so: only what the pause did is undone.
// What is left after that belongs to the guest's own time service.
package guestclock
