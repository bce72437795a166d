// Package vmtests has the end-to-end tests: real belayd, real libvirt, real
// QEMU guests on the hosts of a lab, faults included, and the benchmarks.
//
// Its parts: lab (hosts out of namespaces), guest (what runs on them), probe
// and observer (the rulers), cluster (belayd on every host), pki, clients (others'
// programs that are told of events).
//
// BELAY_LONG=1 runs the long forms, BELAY_LAB=skip leaves everything out that
// needs a lab.
package vmtests
