// Package wire carries several connections over the one byte stream of a
// virtio-serial port, between belayd and belay-guest. It is made for a stream
// whose other end may not be there, may begin anew at any byte, and on the
// guest's side may mean harm.
//
// # Greetings
//
// What QEMU does with bytes (hw/char/virtio-console.c, virtio-serial-bus.c): it
// does not read those for a guest that has not opened the port, so they queue
// in the host's socket; it drops those of a guest while no host is connected;
// and it tells the host nothing when the guest closes or opens the port. So
// bytes of an old session, whole or cut, may lie before those of the new one,
// and either side has to find where that begins. A greeting is a mark of 16
// bytes, what it says, a session's random number, and a checksum:
//
//	host                            guest
//	 │ wake ─────────────────────────► │   on connecting: who is in a session leaves it
//	 │ ◄───────────────────── hello(n) │   with another number each time, until answered
//	 │ answer(n) ────────────────────► │
//	 │ ◄─────────── session n ───────► │
//
// A guest sends nothing between hello and answer, so a hello with bytes behind
// it is an old one. Whoever reads looks for the mark always, in a session too:
// a greeting ends it. For a mark not to be in what is forwarded, by chance or
// because a program in the guest sends it, a session's bytes are XORed with its
// number, as WebSocket does (RFC 6455, section 5.3). The host is silent but for
// wake until it is spoken to: what nobody reads does not pile up.
//
// # Sessions
//
// A frame is kind (1 byte), stream (4), n (2), big-endian, and for data n bytes:
//
//	open    the guest begins a stream, numbered upwards
//	data    at most 4096 bytes, and no more than the receiver has room for
//	credit  the receiver has room for n bytes more; at first it has 16384
//	fin     the sender sends no more
//	close   the sender sends no more, and reads no more
//	alive   somebody is there: every 15 s
//
// The session ends when nothing comes for 45 s, when a write takes longer than
// 10 s, or when the other side breaks a rule. Rules are few and are checked
// before anything is kept, so a guest can have the host hold 32 streams and
// 16 KiB for each, and nothing else: no frame is answered by who reads frames,
// and so a guest that never reads only stops those who write to it.
//
// It is not yamux, whose windows are 256 KiB at least and which starts a
// goroutine for each ping that it is sent, and waits for writes with its table of
// streams locked.
package wire

import "time"

// Name is the name of the virtio-serial port: libvirt's target name, and in a
// guest the file in /dev/virtio-ports.
const Name = "org.belay.events.0"

// VsockPort is the port on which a host listens for guests that come by vsock.
const VsockPort = 48254

// MaxStreams is how many streams a session has at once.
const MaxStreams = 32

const (
	window       = 16 << 10 // bytes on their way to who has not read them
	maxData      = 4 << 10  // bytes in a frame, so that streams take turns
	aliveEvery   = 15 * time.Second
	silence      = 45 * time.Second
	writeTimeout = 10 * time.Second
)
