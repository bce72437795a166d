// Package identity tells which guest asks the metadata service, in a way that a
// guest on a bridge cannot forge: by the tap that its frames come from.
//
//	Gate       Open, Set ports, Listen, Check, Close
//	marks      packet marks, and which may be given out
//	rules      nftables: a frame gets its tap's mark, or is dropped
//	route      a mark makes the packet the host's, and finds the way back
//	watch      taps that go away, bridges that change
//	listen     a socket for each bridge; a connection has the mark of the packet that opened it
//
// The way of a request:
//
//	tap ─► bridge prerouting ──────► routing rule ──► socket ─► SO_MARK ─► UUID
//	       tap, MAC, address known?  mark's table:    tcp_fwmark_accept
//	       mark, to the host's MAC   "local"
//	tap ◄─ bridge output ◄────────── routing rule ◄── reply with the socket's mark
//	       only to the mark's tap    mark's bridge
//
// # No address
//
// 169.254.169.254 is on no device. It is the host's own by routing rules for our
// marks only, and the listener is IP_TRANSPARENT. Therefore a packet without a mark
// cannot reach the service: not from an uplink, not from the host itself, not from a
// tap that is not known (yet), not when the tables have been flushed. Who sets a
// mark on the host itself (CAP_NET_ADMIN, CAP_NET_RAW) is stopped by a rule. ARP goes the
// same way: only a request with a mark is answered. A host that asks a metadata
// service of its own, as one in a cloud does, goes on doing so.
//
// A guest need not have a route: also what it sends to its gateway is turned to
// the host. The host needs no address in the guest's subnet, and guests on
// different bridges may have the same address, and ask from the same port at the same
// time: each bridge has a listening socket of its own. Where the host has no address
// on a bridge it asks by ARP from 169.254.169.254, rather than tell guests one that it
// has elsewhere.
//
// # What is guaranteed
//
// For guests whose ports are set:
//
//   - A request is its guest's who owns the tap. Source MAC and, where addresses are
//     known, IP and ARP addresses must be the guest's. Marks that others have set are
//     overwritten in each frame to 169.254.169.254; bits outside the mask stay.
//   - A reply leaves by the tap that the question came from, whoever has made the host
//     believe by ARP that the address is his.
//   - Nobody adds to another's connection: each packet must have the mark of the
//     socket that it is for.
//   - Nobody else, uplinks included, is 169.254.169.254 for the guest, by ARP or IP.
//   - A tap that goes takes its identity and its connections with it at once, and a mark
//     is not given out again within an hour. Devices are known by index, and
//     the kernel gives none out again before it has given out all.
//   - Frames with a VLAN tag, IP fragments, and all else to 169.254.169.254 but ARP and
//     TCP to port 80 is dropped. IPv6 is not served.
//
// Nothing is changed for frames that are not to or from 169.254.169.254, so
// failover addresses, nested guests and forged addresses in them pass as before.
// libvirt's nwfilter judges frames first, and what it drops stays dropped.
// Ports and bridges that are not set are left alone: their frames to
// 169.254.169.254 go where they would go without this package.
//
// # What is not
//
//   - Without known addresses, a neighbour on the bridge can take a guest's address by
//     ARP, and so keep it from asking. It neither reads nor adds anything.
//   - A guest with an address of the host, or of loopback, is not answered: the kernel
//     takes it for a forgery.
//   - Rules of others with a later priority can drop or change packets: an INPUT chain must
//     accept TCP to port 80 of 169.254.169.254. Check names nftables rules that have
//     the address in them, and cannot see those of iptables-legacy.
//   - Bridges inside of a VRF, taps that are on no Linux bridge (Open vSwitch, macvtap,
//     SR-IOV).
//   - A guest that opens connections takes its share of the listener's queue, which the
//     guests of a bridge share: 50 a second by each tap, and 100 at once.
//   - While nobody listens, guests wait instead of being refused: the kernel does not send
//     a reset from an address that it does not have.
//   - tcp_fwmark_accept and src_valid_mark stay set, for all marks and not only ours.
//   - Two gates in one network namespace undo each other's rules. A second one cannot
//     listen.
//
// # Restart
//
// A killed process leaves its rules, which have nobody let in: there is no
// listener. The next gate does not know the old marks, and listens on no bridge
// until its first Set replaces the rules in one transaction: who asks meanwhile
// waits, as TCP tries again.
//
// Sources: linux/netfilter/nf_tables.h, tcp_fwmark_accept and src_valid_mark in
// Documentation/networking/ip-sysctl.rst, SO_MARK in socket(7), IP_TRANSPARENT in ip(7).
package identity
