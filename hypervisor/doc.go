// Package hypervisor talks to libvirt on this host. It is the only package that
// imports go-libvirt, and it gives everything back in the words of belay/agent/maint.
//
//	Host
//	 ├─ pool of up to 4 control connections      one call at a time on each
//	 │     Ping Info Guests Guest GuestXML CompareCPU DryRun QMP
//	 │     QuitMigrated QuitIncoming
//	 │     AbortJob Job CompletedJob SetAutostart Define UndefineInactive Launch SavedXML
//	 │     SetNote Note SetPolicy
//	 ├─ fan of up to 24 more, see Warm           the same, for many guests at once
//	 │     Suspend Resume State GuestTime SetGuestTime AgentCommand
//	 ├─ events connection, kept by Run           lifecycle, agent state
//	 │     └─► hub ─► one unbounded queue per Subscribe
//	 └─ one connection per running Migrate, Save, Restore, CreatePaused, CPUTimes
//	        │                                    lives as long as that does
//	        ▼  unix socket, libvirt's RPC
//	     virtqemud or libvirtd
//
// # What is not here
//
// There is no call that destroys, shuts down, resets or reboots a domain, and
// there will be none: whatever a bug, a crash or a confused recovery makes of
// the rest of Belay, it cannot end a guest through this package. A test reads
// the package's source for such calls. Undefining is refused while a domain is
// active. QMP and AgentCommand refuse commands that end a guest. The calls that
// end a process are QuitMigrated and QuitIncoming, and only where QEMU itself says
// that its guest has left it, or has not arrived.
//
// # Connections
//
// A libvirt call cannot be cancelled: go-libvirt knows neither contexts nor
// deadlines. When a call's context ends its connection is closed, which is the
// one thing that reliably brings the call back, and a new object takes its place
// at the next call (an object that reconnects races with itself). That is why a
// control connection carries one call at a time: the caller who gives up loses
// its own call and nobody else's, and an abort never waits behind a slow listing.
//
// What libvirt was sent it may carry out all the same, when it is itself again.
// For most calls that is harmless, or is said with the call. A late Suspend would
// leave a guest paused that everybody believes running: its connection is kept
// until it is answered, and State, Resume and the next Suspend wait for that.
//
// Events are subscribed to once per connection and end with it, because
// cancelling a subscription can block the connection for good. After each
// (re)connection subscribers get EventResync: whatever happened before it must
// be found by listing.
//
// # After libvirt's start
//
// A libvirt that has just started answers with the states that its predecessor
// wrote down, and asks the QEMUs meanwhile. State and the listings therefore look,
// once on each connection, whether it knows better yet. And a predecessor that
// died while it paused or resumed a guest may have left that guest paused with
// its disk leases held, which no libvirt can resume: Resume gives them up first.
//
// # Errors
//
// A failed call gives an *Error with the libvirt function, the socket, and
// libvirt's code and message. errors.Is finds maint.ErrNoGuest, maint.ErrNoJob,
// maint.ErrHypervisorDown (refused, lost, or no answer in time) and the
// context's error in it. CompareCPU gives *IncompatibleCPU and UndefineInactive
// ErrActive where those are the answer, and ErrBusy and ErrIncoming stand for
// calls that libvirt would let hang. maint.ErrNoAgent and maint.ErrLocked are
// found in errors of what concerns agents and leases; *AgentError and *QMPError are
// what the agent or QEMU say themselves.
package hypervisor
