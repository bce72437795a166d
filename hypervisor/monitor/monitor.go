package monitor

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"
)

var (
	// ErrTaken: somebody else, libvirtd in all likelihood, is this monitor's
	// client.
	ErrTaken = errors.New("no greeting: the monitor serves somebody else, libvirt for one")
	// ErrNotPaused refuses to start vCPUs that were not merely paused.
	ErrNotPaused = errors.New("the guest is not paused")
)

// CommandError is QEMU's refusal of a command.
type CommandError struct {
	Class string // QAPI's: "GenericError", …
	Desc  string
}

// Error implements error.
func (e *CommandError) Error() string { return "QEMU: " + e.Desc }

const (
	// lineMax bounds a message. QEMU's are a few hundred bytes.
	lineMax = 64 << 10
	// defaultTimeout bounds a call whose context has no deadline.
	defaultTimeout = 5 * time.Second
	// again is how long Dial waits when the socket's queue is full.
	again = 20 * time.Millisecond
)

// Monitor is a connection to a QEMU's monitor. It is for one goroutine.
type Monitor struct {
	path string
	conn net.Conn
	in   *bufio.Reader
	sent int   // commands
	lost error // why it cannot be used any more
}

// Dial connects to the monitor at path, within the context's deadline or else 5 s.
// It wraps ErrTaken when nothing comes from the other end until then.
//
// Source: QMP's greeting, qmp_capabilities.
func Dial(ctx context.Context, path string) (*Monitor, error) {
	ctx, cancel := bounded(ctx)
	defer cancel()
	conn, err := connect(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("cannot connect to monitor %s: %w", path, err)
	}
	m := &Monitor{path: path, conn: conn, in: bufio.NewReaderSize(conn, lineMax)}
	if err := m.greet(ctx); err != nil {
		m.Close()
		return nil, fmt.Errorf("cannot speak to monitor %s: %w", path, err)
	}
	return m, nil
}

// connect waits for a place in the socket's queue, which is short.
func connect(ctx context.Context, path string) (net.Conn, error) {
	for full := false; ; full = true {
		conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
		switch {
		case full && errors.Is(err, context.DeadlineExceeded): // between two tries
			return nil, fmt.Errorf("%w (%w)", ErrTaken, err)
		case !errors.Is(err, syscall.EAGAIN):
			return conn, err
		}
		select {
		case <-time.After(again):
		case <-ctx.Done():
			return nil, fmt.Errorf("%w (%w)", ErrTaken, context.Cause(ctx))
		}
	}
}

// greet takes the greeting and ends the negotiation of capabilities.
func (m *Monitor) greet(ctx context.Context) error {
	greeted := false
	err := m.within(ctx, func() error {
		msg, err := m.receive()
		if err != nil {
			return err
		}
		greeted = true
		if msg.QMP == nil {
			return errors.New("the other end is no QMP monitor")
		}
		_, err = m.command("qmp_capabilities")
		return err
	})
	if !greeted && errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("%w (%w)", ErrTaken, err)
	}
	return err
}

// Close ends the connection, and lets libvirtd have the monitor.
func (m *Monitor) Close() error {
	m.lost = net.ErrClosed
	return m.conn.Close()
}

// UUID is the guest's.
//
// Source: QMP query-uuid.
func (m *Monitor) UUID(ctx context.Context) (string, error) {
	var is struct {
		UUID string `json:"UUID"`
	}
	err := m.within(ctx, func() error { return m.query("query-uuid", &is) })
	if err == nil && is.UUID == "" {
		err = errors.New("the answer has no UUID")
	}
	if err != nil {
		return "", fmt.Errorf("cannot ask monitor %s for its guest: %w", m.path, err)
	}
	return is.UUID, nil
}

// The run states (QAPI's RunState) that matter here.
const (
	Running     = "running"
	Paused      = "paused"
	PostMigrate = "postmigrate" // its guest was sent away, completely
)

// Status gives the run state.
//
// Source: QMP query-status.
func (m *Monitor) Status(ctx context.Context) (state string, err error) {
	err = m.within(ctx, func() error {
		state, err = m.status()
		return err
	})
	if err != nil {
		return "", fmt.Errorf("cannot ask monitor %s for its guest's state: %w", m.path, err)
	}
	return state, nil
}

func (m *Monitor) status() (string, error) {
	var is struct {
		Status string `json:"status"`
	}
	err := m.query("query-status", &is)
	if err == nil && is.Status == "" {
		err = errors.New("the answer has no status")
	}
	return is.Status, err
}

// Cont starts the vCPUs of a guest that is paused, and returns when QEMU says
// that it runs. One that runs already is left alone. In every other state it
// refuses with ErrNotPaused: a guest that is just arriving, was sent away, has
// crashed, or waits for its disks.
//
// Source: QMP query-status, cont.
func (m *Monitor) Cont(ctx context.Context) error { return m.cont(ctx, Paused) }

// TakeBack is Cont for a guest that was sent away (PostMigrate). Whoever calls it
// must know that nobody runs what was sent: the guest would be there twice.
func (m *Monitor) TakeBack(ctx context.Context) error { return m.cont(ctx, PostMigrate) }

func (m *Monitor) cont(ctx context.Context, from string) error {
	err := m.within(ctx, func() error {
		// Nobody else can change the state in between: the monitor is ours.
		state, err := m.status()
		if err != nil || state == Running {
			return err
		}
		if state != from {
			return fmt.Errorf("%w, it is %q", ErrNotPaused, state)
		}
		if _, err := m.command("cont"); err != nil {
			return err
		}
		if state, err = m.status(); err == nil && state != Running {
			err = fmt.Errorf("it is %q after that", state)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("cannot start the guest of monitor %s: %w", m.path, err)
	}
	return nil
}

// message is anything that QEMU says.
type message struct {
	QMP    json.RawMessage `json:"QMP"` // the greeting
	ID     int             `json:"id"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
}

// query makes a command and reads its answer.
func (m *Monitor) query(name string, into any) error {
	answer, err := m.command(name)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(answer, into); err != nil {
		return fmt.Errorf("cannot read the answer to %s: %w", name, err)
	}
	return nil
}

// command makes a command and gives the content of "return". Events are passed
// over, and so are answers to somebody else's commands.
func (m *Monitor) command(name string) (json.RawMessage, error) {
	m.sent++
	if _, err := fmt.Fprintf(m.conn, `{"execute":%q,"id":%d}`+"\n", name, m.sent); err != nil {
		return nil, err
	}
	for {
		msg, err := m.receive()
		switch {
		case err != nil:
			return nil, fmt.Errorf("no answer to %s: %w", name, err)
		case msg.ID != m.sent:
			continue
		case msg.Error != nil:
			return nil, &CommandError{msg.Error.Class, msg.Error.Desc}
		case msg.Return == nil:
			return nil, fmt.Errorf("the answer to %s is neither a return nor an error", name)
		}
		return msg.Return, nil
	}
}

// receive reads one message, which is one line.
func (m *Monitor) receive() (msg message, err error) {
	line, err := m.in.ReadSlice('\n')
	switch {
	case errors.Is(err, bufio.ErrBufferFull):
		return msg, fmt.Errorf("a message of more than %d bytes", lineMax)
	case errors.Is(err, io.EOF):
		return msg, errors.New("the other end has hung up")
	case err != nil:
		return msg, err
	}
	if err := json.Unmarshal(bytes.TrimSpace(line), &msg); err != nil {
		return msg, fmt.Errorf("a message that is none: %w", err)
	}
	return msg, nil
}

// within runs an exchange within the context. One that failed otherwise than by
// QEMU's refusal, or ours, leaves the connection out of step, and it is closed.
func (m *Monitor) within(ctx context.Context, exchange func() error) error {
	if m.lost != nil {
		return m.lost
	}
	ctx, cancel := bounded(ctx)
	defer cancel()
	if deadline, ok := ctx.Deadline(); ok {
		_ = m.conn.SetDeadline(deadline)
	}
	stop := context.AfterFunc(ctx, func() { _ = m.conn.SetDeadline(time.Unix(1, 0)) })
	err := exchange()
	inTime := stop()
	if inTime && (err == nil || errors.As(err, new(*CommandError)) || errors.Is(err, ErrNotPaused)) {
		return err
	}
	_ = m.conn.Close()
	cause := context.Cause(ctx)
	if cause == nil && errors.Is(err, os.ErrDeadlineExceeded) {
		cause = context.DeadlineExceeded // the connection's clock was the quicker
	}
	if cause != nil {
		m.lost = fmt.Errorf("given up: %w", cause)
	}
	switch {
	case err == nil: // it ended in the last moment: the answer counts
	case cause != nil:
		err = fmt.Errorf("%w: %w", cause, err)
		fallthrough
	default:
		m.lost = err
	}
	return err
}

func bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, defaultTimeout)
}
