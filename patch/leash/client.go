package leash

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"time"

	"belay/agent/boottime"
	"belay/agent/maint"
)

// Launcher starts leashes' processes; see package launch.
type Launcher interface {
	// Launch starts the leash of an operation, and returns when it has been
	// started; that one is there already is no error. The warnings are what
	// this way of starting lacks.
	Launch(ctx context.Context, op maint.OpID) (warnings []string, err error)
}

// Client arms leashes.
type Client struct {
	Dir      string // of all leashes' files, in RAM
	Launcher Launcher
	Log      *slog.Logger
}

// ErrNone: the operation has no leash and there are no notes of one, so none
// was armed, or it was disarmed.
var ErrNone = errors.New("there is no leash")

const (
	// redial is between two tries to reach a leash that was just started.
	redial = 2 * time.Millisecond
	// launchTimeout bounds the time from a leash's start to its answer,
	// where nothing is paused yet.
	launchTimeout = 10 * time.Second
)

// Arm starts a leash and gives it the order. It returns when the leash has
// written the order down and its own connection to libvirt has answered for
// every guest. Guests that do not run are Left from the start. Only then may a
// vCPU be stopped.
//
// A refusal is a *maint.Problem; nothing holds then and nothing may be paused.
func (c *Client) Arm(ctx context.Context, o Order) (*Line, error) {
	line, err := c.arm(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("cannot arm the leash of %s: %w", o.Op, err)
	}
	return line, nil
}

func (c *Client) arm(ctx context.Context, o Order) (*Line, error) {
	if err := checkOp(o.Op); err != nil {
		return nil, err
	}
	boot, err := boottime.ID()
	if err != nil {
		return nil, err
	}
	if o.Silence == 0 {
		o.Silence = defaultSilence
	}
	s := &Status{Op: o.Op, Boot: boot, Silence: o.Silence, KillLibvirt: o.KillLibvirt}
	for _, g := range o.Guests {
		s.Guests = append(s.Guests, GuestStatus{Guest: g, Fate: Armed})
	}
	if o.MaxPause <= 0 {
		return nil, maint.Problemf(maint.CodeBadRequest, "leash "+string(o.Op), "", "a pause of %s", o.MaxPause)
	}
	s.Deadline = boottime.Now() + o.MaxPause
	if err := s.check(boottime.Now()); err != nil {
		return nil, err
	}
	if err := makeDir(c.Dir); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, launchTimeout)
	defer cancel()
	l := newLine(c, s)
	l.pause = o.MaxPause
	return l.begin(ctx, doArm)
}

// Attach takes up the leash of an operation whose holder has died, and renews
// it from then on. A leash that has died too is started again, and goes on from
// its notes. ErrNone: nothing was armed, or it is over.
func (c *Client) Attach(ctx context.Context, op maint.OpID) (*Line, error) {
	line, err := c.attach(ctx, op)
	if err != nil {
		return nil, fmt.Errorf("cannot take up the leash of %s: %w", op, err)
	}
	return line, nil
}

func (c *Client) attach(ctx context.Context, op maint.OpID) (*Line, error) {
	if err := checkOp(op); err != nil {
		return nil, err
	}
	boot, err := boottime.ID()
	if err != nil {
		return nil, err
	}
	s, err := readNotes(c.Dir, op)
	if errors.Is(err, fs.ErrNotExist) || err == nil && s.Boot != boot {
		return nil, ErrNone
	}
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, launchTimeout)
	defer cancel()
	return newLine(c, s).begin(ctx, doTake)
}

// dial connects to a leash that is there.
func (c *Client) dial(op maint.OpID) (net.Conn, error) {
	return net.Dial("unix", path(c.Dir, op, socketExt)) // at once or not at all
}

// reach connects to the operation's leash, and starts one if none is there.
func (l *Line) reach(ctx context.Context) (net.Conn, error) {
	conn, err := l.c.dial(l.op)
	if err == nil {
		return conn, nil
	}
	warnings, err := l.c.Launcher.Launch(ctx, l.op)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	l.launch = warnings
	l.mu.Unlock()
	for {
		conn, err := l.c.dial(l.op)
		if err == nil {
			return conn, nil
		}
		if !sleep(ctx, redial) {
			return nil, maint.Problemf(maint.CodeTimeout, "leash "+string(l.op), "see its log",
				"was started and does not answer: %v", err)
		}
	}
}
