// Package probe is what runs inside a lab guest, and the formats in which it
// talks to the outside.
//
// The probe is a ruler, so it measures as little as it can and as plainly as
// it can:
//
//   - a [Sender] emits a [Heartbeat] datagram at a fixed rate on the guest's
//     monotonic clock. A receiver on the LAN (package observer) sees a pause of
//     the guest as a hole in that train.
//   - a [Memory] keeps a working set whose every word is known beforehand and
//     dirties it at a set rate, so that a page which a migration lost, tore or
//     replayed is found by [Memory.Verify].
//   - a [Disk] writes a known pattern to the raw block device and reads it
//     back past the page cache.
//   - a [Clock] notes each time that somebody sets the guest's wall clock, for
//     those who put clocks right.
//   - a [Server] answers JSON lines on a virtio-serial port.
//
// The binary is belay/vmtests/probe/cmd. It is static and started by the guest
// image's init; a probe that dies is started again, which shows as a new
// incarnation in its heartbeats and its status.
package probe
