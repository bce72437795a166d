package wire

import (
	"bufio"
	"crypto/rand"
	"errors"
	"io"
	"os"
	"time"
)

// Transport is the byte stream: the host's unix socket, the guest's device.
type Transport interface {
	io.ReadWriteCloser
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
}

// Port is one end of a byte stream, and has one session after another. Closing
// the transport ends whatever it does.
type Port struct {
	t Transport
	r reader
}

// NewPort takes the transport.
func NewPort(t Transport) *Port {
	return &Port{t: t, r: reader{buf: bufio.NewReader(t)}}
}

// Hellos are repeated, since one may be lost in what an old session has left.
const (
	helloFirst = time.Second
	helloMost  = 5 * time.Second
)

// Accept waits for a guest to begin a session, for as long as it takes. The
// session before must be over. Errors are those of the transport.
func (p *Port) Accept() (*Session, error) {
	// A guest that is in a session which nobody has any more is to begin anew;
	// one that does so already is not to do it twice.
	if !p.r.marked {
		if err := p.greet(greeting{kind: wake}); err != nil && !isTimeout(err) {
			return nil, err
		}
	}
	if err := p.t.SetReadDeadline(time.Time{}); err != nil {
		return nil, err
	}
	for {
		g, err := p.r.greeting()
		if err != nil {
			return nil, err
		}
		if g.kind != hello || p.r.buf.Buffered() > 0 {
			continue
		}
		switch err := p.greet(greeting{answer, g.number}); {
		case err == nil:
			return newSession(p, g.number, true), nil
		case !isTimeout(err): // else the guest has stopped reading
			return nil, err
		}
	}
}

// Dial waits for the host to answer, for as long as it takes. The session
// before must be over. Errors are those of the transport.
//
// On a virtio-serial device a write waits for a host, and a read ends at once
// while there is none (Linux, drivers/char/virtio_console.c): so waiting is done
// by writing.
func (p *Port) Dial() (*Session, error) {
	for wait := helloFirst; ; wait = min(2*wait, helloMost) {
		var n number
		rand.Read(n[:]) // never fails
		if err := p.t.SetWriteDeadline(time.Time{}); err != nil {
			return nil, err
		}
		if _, err := p.t.Write(greeting{hello, n}.encode()); err != nil {
			return nil, err
		}
		until := time.Now().Add(wait)
		if err := p.t.SetReadDeadline(until); err != nil {
			return nil, err
		}
		switch err := p.answered(n); {
		case err == nil:
			return newSession(p, n, false), nil
		case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
			time.Sleep(time.Until(until)) // nothing tells when that is over
		case !isTimeout(err):
			return nil, err
		}
	}
}

// answered reads until a hello is answered.
func (p *Port) answered(n number) error {
	for {
		g, err := p.r.greeting()
		if err != nil || g == (greeting{answer, n}) {
			return err
		}
	}
}

// greet writes a greeting.
func (p *Port) greet(g greeting) error {
	if err := p.t.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	_, err := p.t.Write(g.encode())
	return err
}

func isTimeout(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }
