// Package hypervisortest has hosts that exist in memory only, with libvirt's
// behaviour and with faults, and the contract that they and the real ones of
// package hypervisor both keep.
//
//	w := hypervisortest.NewWorld()
//	defer w.Close()
//	a := w.AddHost("host-a", hypervisortest.HostOptions{})
//	b := w.AddHost("host-b", hypervisortest.HostOptions{})
//	web := a.PutGuest("web-1")
//	err := a.Migrate(ctx, web, maint.MoveParams{DestURI: b.URI(), Persist: true})
//
// A migration goes through these phases, in a goroutine of its own, in steps of
// time (see Copy). What ends it early leaves what libvirt leaves:
//
//	          source            destination     ended early by              leaves
//	disks     running           paused          as copying; only where disks are copied
//	copying   running           paused          abort, either libvirt       source running,
//	                                            killed, destination's       destination gone
//	                                            QEMU killed, LAN cut 30 s
//	suspended paused            paused          the same                    source resumed,
//	                                                                        destination gone
//	performed paused            paused          source's libvirt killed     source paused,
//	                                                                        destination gone
//	                                            the others                  as above
//	post-copy paused            running         either libvirt killed, LAN  nothing: QEMU goes on
//	                                            cut for less than 15 min
//	                                            LAN cut for longer,         both halves, until
//	                                            BreakPostCopy               it is resumed
//	                                            either QEMU killed          the other half
//	resumed   paused            running         source's libvirt killed     source paused,
//	                                                                        destination running
//	                                            destination's libvirt       both running: libvirt
//	                                            killed, LAN cut 30 s        knows no better
//	stopped   shut off or gone  running         nothing: it is over
//
// A guest's wall clock stands while its vCPUs do: a guest that was held is behind
// by as long as it was, until somebody sets its clock (see Host.ClockOffset). Its
// agent, its QEMU and a rival for its disks are up to the test: SetAgentDelay,
// OnAgent, OnQMP, SendAway, TakeLease.
//
// Everything waits on timers and channels alone, so a World made inside a
// testing/synctest bubble runs in its time. Close it before the bubble ends.
package hypervisortest
