package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/digitalocean/go-libvirt"

	"belay/agent/maint"
)

// Refusals of this package, made without libvirt.
var (
	// ErrActive refuses to undefine, or start, a domain that is active.
	ErrActive = errors.New("domain is active")
	// ErrBusy refuses what libvirt would have wait for the end of the
	// domain's job, for up to 30 s.
	ErrBusy = errors.New("domain has a job running")
	// ErrIncoming refuses to abort a migration on its destination.
	ErrIncoming = errors.New("an incoming migration can be aborted on its source only")
)

// Error is a libvirt call that failed, or got no answer.
type Error struct {
	Op      string // libvirt function, without "vir": "DomainAbortJob"; "connect" before any call
	Socket  string // the daemon's socket
	Code    int    // virErrorNumber; 0 when libvirt did not answer or was not asked
	Message string

	// cause is what errors.Is finds: a sentinel of maint, the context's
	// error, both, or nil.
	cause error
}

// NewError makes an Error that wraps the causes given; fakes use it.
func NewError(op, socket string, code int, message string, causes ...error) *Error {
	return &Error{Op: op, Socket: socket, Code: code, Message: message, cause: errors.Join(causes...)}
}

// Error implements error.
func (e *Error) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "libvirt %s on %s: %s", e.Op, e.Socket, e.Message)
	if e.Code != 0 {
		fmt.Fprintf(&b, " (libvirt error %d)", e.Code)
	}
	return b.String()
}

// Unwrap gives the sentinels behind the error.
func (e *Error) Unwrap() error { return e.cause }

// because has a libvirt error wrap one more cause.
func because(err, cause error) error {
	var e *Error
	if !errors.As(err, &e) {
		return fmt.Errorf("%w: %w", cause, err)
	}
	return NewError(e.Op, e.Socket, e.Code, e.Message, e.cause, cause)
}

// IncompatibleCPU says that this host cannot run a CPU.
type IncompatibleCPU struct {
	Reason string // libvirt's words, for example the features that are missing
}

// Error implements error.
func (e *IncompatibleCPU) Error() string { return "incompatible CPU: " + e.Reason }

// wrap turns what a go-libvirt call returned into an *Error.
func (c *conn) wrap(ctx context.Context, op string, err error) error {
	e := &Error{Op: op, Socket: c.socket, Message: err.Error()}
	if ctxErr := context.Cause(ctx); ctxErr != nil {
		// The connection was closed because the context ended, whatever
		// go-libvirt made of that.
		return c.abandoned(op, ctxErr)
	}
	var le libvirt.Error
	switch {
	case errors.As(err, &le):
		e.Code = int(le.Code)
		switch libvirt.ErrorNumber(le.Code) {
		case libvirt.ErrNoDomain:
			e.cause = maint.ErrNoGuest
		case libvirt.ErrMigrateUnsafe:
			e.cause = maint.ErrUnsafeStorage
		}
	case errors.Is(err, libvirt.ErrUnsupported):
		// go-libvirt drops the code of "unknown procedure".
		e.Code = int(libvirt.ErrNoSupport)
	case c.unusable():
		e.Message = "connection lost: " + err.Error()
		e.cause = maint.ErrHypervisorDown
	default:
		e.cause = err // encoding, decoding
	}
	return e
}

// abandoned is the error of a call whose context ended.
func (c *conn) abandoned(op string, ctxErr error) error {
	return gaveUp(op, c.socket, ctxErr)
}

// gaveUp is the error of a call that its context ended. A deadline means
// that libvirt did not answer in time, which callers treat as its being down;
// a caller's own cancellation says nothing about libvirt.
func gaveUp(op, socket string, ctxErr error) error {
	if errors.Is(ctxErr, context.DeadlineExceeded) {
		return NewError(op, socket, 0, "no answer in time", maint.ErrHypervisorDown, ctxErr)
	}
	return NewError(op, socket, 0, "given up: "+ctxErr.Error(), ctxErr)
}
