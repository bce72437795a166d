// Package leash is what ends a pause when nobody else does. A small process of
// its own, outside belayd's cgroup and with its own connection to libvirt, is
// given an order before the first vCPU stops: these guests, until then. It
// resumes what Belay paused when the deadline passes or belayd falls silent,
// whatever has died, and touches nothing else.
//
//	Keeper      the leash itself: order, deadline, release
//	Client      arms a leash, or takes up one that is there
//	Line        an armed leash as its holder sees it; renews itself
//	Launcher    starts the process; see package launch
//	Leftovers   notes of leashes whose belayd has died
//	Sweep       discards what nobody needs any more
//
// A leash's life:
//
//	        arm             deadline, silence, SIGTERM
//	idle ─────────► armed ─────────────────────────────► fired
//	  │               │ disarm                             │ all released
//	  │ 30 s          ▼                     disarm         ▼
//	  └───────────► gone ◄────────────────────────────── settled ──► exits, leaving
//	                                                       its notes (Config.Keep)
//
// and that of a guest in it, by its Fate:
//
//	armed ──► paused ──► released        by belayd, by the leash, by anybody
//	  │          └─────► left            it ended, or is paused by something else
//	  └────────────────► left            it was paused before: somebody else's
//
// A guest that is armed and found paused by "user" after the leash has fired is
// Belay's: it ran when the leash was armed, and belayd died before it could say
// that it had paused it.
//
// # Ways of release
//
// libvirt first. When it cannot be reached or does not answer for a second, the
// guest's QMP monitor: QEMU serves one client there, so this works when libvirtd
// is dead, and not when it hangs with the monitor in its hand. Then the guest stays
// paused until libvirt goes on or is killed, by the leash itself if the order says
// so (Order.KillLibvirt). Past libvirt the guest runs without the leases of its disks; when libvirt is back the leash
// stops and resumes it once through libvirt, which takes them. When a lease is
// held by somebody else the guest stays paused, and the alarm goes on: two
// writers would destroy the disk.
//
// # What survives what
//
// The order and all that is known of its guests is in a file in a folder of
// RAM, replaced in one step and never synced: it need not survive a boot, which
// the guests do not survive either, and disks may be what is being serviced. The
// deadline is one of CLOCK_BOOTTIME, so a leash that is started again goes on
// with the same one, and neither a clock that is set nor a suspended host moves
// it. A file of another boot is void.
package leash
