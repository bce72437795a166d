// Package observer is the ruler on the LAN: it receives the heartbeats of the
// lab's guests (package probe) and tells how long a guest was not there, what
// was lost on the way, and by how much its clock is off.
//
//	o, err := observer.Listen(conn, observer.Options{})
//	err = o.Await(ctx, "web-1", 500) // the train runs
//	m := o.Mark()
//	… migrate web-1 …
//	r := o.Since(m, "web-1")
//	r.Pause() // the blackout, as a client on the LAN saw it
//
// Arrival is when the kernel took the datagram off the network, not when this
// process came round to reading it, so a busy machine does not lengthen a gap.
// Reading and reporting share one lock and a report first drains the socket:
// what had arrived when Since was called is in it.
//
// Two guests that run under one name, source and destination of a migration
// both awake, send the same sequence numbers of the same incarnation: they
// show as duplicates.
package observer
