package vmm

import "time"

// Hurry makes a replacement impatient.
func (r *Replacement) Hurry() {
	p := usual()
	p.handOver, p.retry, p.starts = time.Second, time.Millisecond, 3
	r.pace = &p
}

// GivesUp is how long it waits for a QEMU that was told to quit.
func (r *Replacement) GivesUp(d time.Duration) { r.pace.gone = d }

// Impatient has it wait for no sign of life for long, either.
func (r *Replacement) Impatient() { r.pace.prove = 100 * time.Millisecond }

var (
	Incoming    = incoming
	Listen      = Places.listen
	Receive     = receive
	SameDevices = sameDevices
)

// Result gives what was received, when all is.
func (r *receipt) Result() ([]byte, error) {
	<-r.done
	return r.state, r.err
}
