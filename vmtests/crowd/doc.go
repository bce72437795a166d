// Package crowd has many guests ask one host for their events, to measure it.
//
//	Crowd    namespaces: a host with bridges and taps, the guests' ends in another
//	Server   a process in the host's namespace that answers them
//	Client   a guest's program
//
//	bench ──stdin, stdout──► Server: views, board, journal on disk, identity.Gate
//	  │                         ▲
//	  └─ Clients ─ veth ─ tap ─ bridge
//
// The server is the same program, started again, so that its processor time and
// memory are its own: a program that makes Servers calls [Main] first of all. It
// ends when its stdin does, however whoever started it has ended, and takes the
// journal with it. The namespaces have no names, and last as long as they are used.
//
// Times that are compared across the two processes are of CLOCK_MONOTONIC.
package crowd
