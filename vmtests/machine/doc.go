// Package machine brings up hosts that are whole machines: QEMU virtual machines with
// their own kernel, systemd and libvirtd, in which belayd is installed from its Debian
// package, as an operator would. Guests in them run under KVM: where the machine itself
// has none, QEMU emulates the virtualisation of AMD processors.
//
//	this process ── ssh (10.0.2.0/24 of QEMU's own) ──► host-a  10.77.0.1 ─┐
//	     │                                                                  │ br0: LAN of
//	     └── 10.77.0.254, in a network namespace without a name ────────────┤ hosts and
//	                                                     host-b  10.77.0.2 ─┘ guests
//
// It is for what package lab, whose hosts are namespaces, cannot have: another kernel,
// systemd, a reset, a power cut. Hosts take most of a minute to boot where they are
// emulated; one lab of these is up at a time on a machine.
//
// Nothing outlives the process: QEMU is killed with it, and the LAN is nobody else's.
package machine
