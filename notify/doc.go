// Package notify tells guests what will happen to them, and lets their owners
// answer. Guests ask an HTTP server on 169.254.169.254, as they would in a public
// cloud:
//
//	views     what is asked and answered: one small file for each cloud's form
//	identity  who asks, by the tap that a request came through
//	channel   guests that are on no bridge: vsock, virtio-serial
//	board     the events themselves: what may follow what, and when
//	window    when a guest may be disturbed
//	campaign  maintenance for which owners pick the moment
//
// The root has only what these share.
package notify
