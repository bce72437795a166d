// Package agent composes one host's agent: the only package that knows the
// hypervisor, the journal, the runner and the rungs together.
//
//	Run ──► sweep what leashes of ended operations have left
//	    ──► resume what the journal has open
//	    ──► bring home what is in the twin and nobody accounts for
//	    ──► loop: one goroutine owns the operations
//	          Migrate, Abort ──► admitted? ──► journal ──► goroutine: run.Run(steps)
//	          ended          ──► forget it
//	    ──► inventory: follows libvirt's events, publishes snapshots
//	    ──► peers: greets each peer now and then
//
// Reads (status, guests) come from snapshots and never wait for libvirt.
// Facts come back from operations only as journal records.
package agent
