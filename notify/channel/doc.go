// Package channel serves guests whose packets the host does not see: those on
// macvtap, Open vSwitch or SR-IOV. belay-guest, a small program in the guest,
// listens on 169.254.169.254 there and forwards each connection by one of two
// ways:
//
//	vsock          the host gave the guest its CID, and vhost drops packets with another
//	virtio-serial  whoever is behind a guest's socket is that guest
//
// Either way a Listener gives connections that know their guest; a guest can
// name no other. What it sends is no more to be trusted than what comes over a
// network. In the guest, every process may ask, as with 169.254.169.254 itself.
//
// # vsock
//
// The Linux vhost driver takes a packet from a guest only if its source is the
// guest's own CID (drivers/vhost/vsock.c, vhost_vsock_handle_tx_kick). A Listener
// is told which CID is whose by SetCIDs, refuses others, and closes what a CID's
// former guest has open. libvirt may give the CID of a guest that has ended to the
// next one that starts, so SetCIDs has to come before that: on the event that the
// domain has stopped.
//
// # virtio-serial
//
//	<channel type='unix'>
//	  <source mode='bind'/>
//	  <target type='virtio' name='org.belay.events.0'/>
//	</channel>
//
// QEMU listens on a socket, and serves one client: Connect, until its context
// ends. The socket is there as long as the guest's QEMU: a guest that reboots keeps
// it, one that is migrated or has a new QEMU gets another, which Connect finds at
// the same path. Who can put a socket at that path is whom the guest's identity
// rests on: libvirt, and the user that QEMU runs as. The bytes are package wire's.
package channel
