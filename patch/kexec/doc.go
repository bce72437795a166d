// Package kexec is rung B3: another host kernel under the same guests. Their memory waits
// in RAM that no kernel touches (memmap=nn!ss on the command line), as files of a DAX file
// system on the /dev/pmem that it comes up as.
//
//	Preflight  all that would go wrong is looked for; the plan is written down
//	Load       the new kernel, with its initrd and command line, into this one
//	Save       each guest to a file there, which ends its QEMU; a manifest names it. Of one whose
//	           memory is a file there already, only the state of its devices: see inplace.go
//	Boot       systemd ends the rest and starts the new kernel  ----.
//	Check      in the new kernel, before any guest: is it well? <---'
//	Restore    each guest from its file, once; it runs, and its clock is put right
//	Verify     boot IDs: the host's has changed, the guests' have not
//
// Back is the way back from any of these up to Check: whatever is in the manifest is
// restored under the kernel that runs by then. A new kernel that is not well has the old one
// started in the same way first.
//
// # Once
//
// A saved guest must not run twice, nor from a file that is older than its disks. Beside
// each file is a mark, on the same memory, so that they stay or go together:
//
//	no mark ──► restoring ──► released ──► done
//	   │           │              └ from here on the file is out of date, and never used again
//	   │           └ started with its vCPUs stopped: nothing is lost by doing it over
//	   └──► started: by somebody else, from its disks: the file is out of date, too
//
// A guest in place is kept while it is still in its old QEMU, paused. Until it is written down that this
// is to end the way back is to have it run on there; from then on there is none: see takeUp.
//
// Somebody may also have started a guest, and ended it, while nobody of Belay looked. Its
// disks tell, where they are files: one that was written to since has the guest kept, not
// restored.
//
// All of it is by the manifest and the marks alone, under a lock: belayd does it, and so
// does "belayd -restore" where belayd cannot start.
//
// # What is lost
//
// A power cut empties the memory, and a panic may damage it. The journal has every guest that
// was saved, or was to be; what the memory does not hold, by its checksums, is told as lost.
// A guest's autostart is off from before its save until it is settled, so that libvirt does
// not boot it on the disks of what is in the memory.
package kexec
