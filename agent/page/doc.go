// Package page is the status page of a host: what `belay top`, `belay doctor` and `belay
// report` show, for a browser. It is served on loopback, to whoever is on the host; it
// changes nothing, and needs no JavaScript.
//
//	GET /            host, operations, notices, guests, the ladder
//	GET /ladder      every check of every rung
//	GET /ops/{id}    the report of an operation
//	GET /style.css
//
// Whatever it shows came from elsewhere: guests' names, operators' reasons, libvirt's words.
// It is text to the browser, and no page of another site can have it read (see guard).
package page
