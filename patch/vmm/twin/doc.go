// Package twin is rung B2 by way of a second libvirt daemon on the same host,
// the twin: a guest goes into it and comes back, and has a new QEMU under it.
//
//	┌─ host ──────────────────────────────────────────────────────────────┐
//	│   libvirtd, home                        libvirtd, the twin          │
//	│   /run/libvirt  /etc/libvirt …          its own, below /run/belay-twin │
//	│        │                                     │                      │
//	│     old QEMU ───────────── out ─────────► QEMU in the twin          │
//	│     new QEMU ◄──────────── back ─────────────┘                      │
//	│        └── same bridges, disks, network ─────┘                      │
//	└─────────────────────────────────────────────────────────────────────┘
//
// The twin has a host UUID and a host name of its own, since libvirt migrates
// between different hosts only, and its own mount and UTS namespace. Network and
// process IDs are the host's, and so are all files but libvirt's own.
//
// A guest crosses in one of two ways:
//
//	bounce     live migration. Two blackouts; the guest's memory is there twice
//	           for as long as it is away from home.
//	prewarmed  the memory is a file that both QEMUs map. The second is started,
//	           waiting, while the guest runs in the first; then only the state
//	           of the devices goes over. Two pauses of some ten milliseconds.
//
// # A visit
//
// A [Visit] is read down one column:
//
//	preflight  can there be two of this guest on one host? Every reason at once
//	out        the twin is started, the guest goes there      undo: Back
//	back       it comes home                                  never given up silently
//	finish     definition as before; the twin is stopped
//
// Where the guest is is never concluded from an error, but seen at both daemons:
//
//	at home         in the twin     it is
//	runs            not there       at home
//	job out         any             on its way out
//	off             runs            in the twin
//	any             job out         on its way home
//	between         between         switching over: look again
//	runs            runs            in both: an alarm, nothing is touched
//	off             not there       off: shut down by its own system
//
// Out leaves the definition at home alone: it neither undefines nor changes it,
// and the twin never has one. So a host that dies in the middle starts the guest
// as it always did. While the guest is away its definition could be started a
// second time, on the same disks; [Guard] says what stands against that.
//
// belayd may die at any point. The next one looks where the guest is, and goes
// on: a copy goes on without belayd, and a guest in the twin is brought home. If
// home refuses it, it runs on in the twin, which then is not stopped, and a
// person is told (ErrStuck). The twin's daemons are children of a supervisor
// ([Serve]), which starts them again when they die, and outlives belayd; when the
// supervisor itself dies they, and the guests, go on, and the next one takes them
// over.
//
// # A prewarmed crossing
//
//	start the second QEMU, paused, -incoming defer   a hook links the memory into its folder
//	x-ignore-shared on both; migrate-incoming
//	migrate                                          ┐ pause
//	resume in the second                             ┘
//	quit the first, out of "postmigrate" only
//
// The first QEMU is the way back until the second has been resumed. After that
// it is none: the guest has written to the memory that both map.
//
//	first          second              what the next belayd does
//	runs           not there           begins anew
//	runs           waits (inmigrate)   ends the second, which may have other devices by now; begins anew
//	runs           loaded, paused      the way back was taken: ends the second
//	migrating      waits               waits
//	postmigrate    waits, or gone      has the first run on, ends the second
//	postmigrate    loaded, paused      resumes the second
//	postmigrate    runs                ends the first
//	gone           loaded, paused      resumes the second
//	gone           runs                nothing: it has crossed
package twin
