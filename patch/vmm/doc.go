// Package vmm is rung B2 within one libvirt: it puts a new QEMU under a guest
// that runs, the guest's memory staying in RAM. (Package twin does the same by
// way of a second libvirt daemon.)
//
//	in-place   the memory is a file on a tmpfs that two processes can map; it
//	           stays where it is, and the state of the devices goes through a
//	           socket. The pause does not grow with memory.
//	copy       libvirt saves the guest to a file in RAM and restores it. The
//	           pause grows with memory, which is there twice meanwhile.
//
// Survey and Choices tell beforehand which way is possible, what it costs, and
// what stands in the way of the others. A replacement is read down one column:
//
//	preflight  survey; refuse with every reason at once; change nothing
//	prepare    write down the plan, link the memory, set the guard    undo: Unprepare
//	swap       pause ─► state out ─► quit │ new QEMU ─► state in ─► run  undo: Back
//	           ──────────────────────────── point of no return
//	prove      its vCPUs advance; its definition is as it was
//	finish     give up what was kept
//
// In place, in libvirt's and QEMU's terms:
//
//	suspend; migrate-set-capabilities x-ignore-shared; migrate unix:
//	quit, out of "postmigrate" only                  libvirt takes the domain down
//	virDomainCreateXML, paused, with "-incoming defer" in the live XML alone
//	    libvirt's hook links the memory into the new domain's folder
//	migrate-incoming unix:; resume
//
// libvirt knows of none of it: to it the guest was paused, ended and started.
//
// # What survives a crash
//
// The plan is in the journal before anything is touched. From the pause on
// nothing is synced to disk: what recovery needs is known beforehand, or is a
// small file in the guard, a folder below /run. It does not survive a boot, as
// the guest's memory does not.
//
//	belayd dies                        its next start
//	before the pause                   begins the swap
//	after the pause, before quit       has the old QEMU run on (so does the
//	                                   caller's leash, meanwhile), and gives up
//	after quit, QEMU still there       tells it again, waits until it has gone: never has it
//	                                   run on, unless somebody else has resumed it
//	the guest is off                   starts the new QEMU from what is kept
//	the new QEMU waits for the state   pours it in, or has it end and starts another
//	the new QEMU has it, paused        resumes it
//	the guest runs                     proves that, gives up what was kept
//
// Where it died is never remembered, but looked up: old and new QEMU are told
// apart by the process and by a word in the domain's XML. A state that could not
// be loaded makes QEMU exit; memory and state are kept, so it is tried again, a
// few times, and then left to a person with all that is needed. Once the guest
// may have run in the new QEMU the kept state is out of date and is never
// loaded again.
//
// # The guard
//
// While the guest is off it must not be started by anybody else: with the same
// disks and no memory of what it was doing. The hook in dist/hooks refuses a
// start of a guest that has a guard and is not the replacement's.
package vmm
