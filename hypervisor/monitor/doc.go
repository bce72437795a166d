// Package monitor speaks QMP directly to a guest's QEMU, on the socket that
// libvirt made for itself. It is the last resort of whoever must have a guest
// run again while libvirtd is dead:
//
//	path, err := monitor.Find("", guest.ID)
//	m, err := monitor.Dial(ctx, path)
//	defer m.Close()
//	uuid, err := m.UUID(ctx) // is it the guest that is meant?
//	err = m.Cont(ctx)
//
// A monitor serves one client at a time. While libvirtd lives it is that client,
// and Dial gets no greeting. Conversely a libvirtd that starts waits for whoever
// holds the monitor: be quick, and close it.
//
// A guest that was started past libvirt runs without the leases of its disks
// that virtlockd keeps. They are taken again by suspending and resuming it
// through libvirt.
//
// The package can start a guest's vCPUs and nothing else. What comes from the
// socket is bounded in size and time, whatever is at the other end.
package monitor
