package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/mdlayher/vsock"

	"belay/notify/channel/wire"
)

// errNoWay: nothing leads to the host.
var errNoWay = errors.New("this guest has no way to its host's belayd")

// way leads to the host.
type way interface {
	// dial opens a connection.
	dial(context.Context) (conn, error)
	// run keeps the way open until ctx ends.
	run(ctx context.Context, log *slog.Logger)
	String() string
}

// conn is a connection that can be closed for writing alone.
type conn interface {
	net.Conn
	CloseWrite() error
}

// find gives the way that is wanted, if it is there.
func find(s settings) (way, error) {
	serial, errSerial := findPort("/", s.device)
	if s.via == "serial" || s.via == "auto" && errSerial == nil {
		return serial, errSerial
	}
	cid, err := vsock.ContextID()
	if err == nil && cid <= vsock.Host {
		err = fmt.Errorf("the CID %d is no guest's", cid)
	}
	if err == nil {
		return vsockWay(s.port), nil
	}
	err = fmt.Errorf("%w: no vsock: %w (add <vsock model='virtio'><cid auto='yes'/></vsock> to the domain)", errNoWay, err)
	if s.via == "auto" {
		return nil, fmt.Errorf("%w; %w", err, errSerial)
	}
	return nil, err
}

// vsockWay is the host's vsock port.
type vsockWay uint32

func (w vsockWay) dial(ctx context.Context) (conn, error) {
	return vsock.DialContext(ctx, vsock.Host, uint32(w), nil)
}

func (vsockWay) run(ctx context.Context, _ *slog.Logger) { <-ctx.Done() }

func (w vsockWay) String() string { return fmt.Sprintf("vsock port %d", uint32(w)) }

// serialWay is a virtio-serial port, open by this process only.
type serialWay struct {
	device   string
	sessions chan *wire.Session // the one that there is, offered over and over
}

// findPort finds the port's device, also where there is no udev to name it (Linux,
// Documentation/ABI: /sys/class/virtio-ports/vportNpM/name).
func findPort(root, device string) (*serialWay, error) {
	if device == "" {
		device = filepath.Join(root, "dev/virtio-ports", wire.Name)
	}
	if _, err := os.Stat(device); err == nil {
		return newSerialWay(device), nil
	}
	names, _ := filepath.Glob(filepath.Join(root, "sys/class/virtio-ports/*/name")) // the pattern is right
	for _, file := range names {
		name, err := os.ReadFile(file)
		if err == nil && strings.TrimSpace(string(name)) == wire.Name {
			return newSerialWay(filepath.Join(root, "dev", filepath.Base(filepath.Dir(file)))), nil
		}
	}
	return nil, fmt.Errorf("%w: no virtio-serial port %s (add <channel type='unix'><target type='virtio' name='%s'/></channel> to the domain)", errNoWay, device, wire.Name)
}

func newSerialWay(device string) *serialWay {
	return &serialWay{device: device, sessions: make(chan *wire.Session)}
}

func (w *serialWay) String() string { return "virtio-serial port " + w.device }

// dial waits for a session as long as ctx lets it.
func (w *serialWay) dial(ctx context.Context) (conn, error) {
	for {
		select {
		case s := <-w.sessions:
			if c, err := s.Open(ctx); err == nil {
				return c, nil
			} // else the session has just ended, or ctx has
		case <-ctx.Done():
			return nil, errors.New("the host does not answer, or has as many connections as it takes")
		}
	}
}

// reopenEvery is how often a device that fails is opened.
const reopenEvery = 2 * time.Second

// run has one session after another.
func (w *serialWay) run(ctx context.Context, log *slog.Logger) {
	said := ""
	for ctx.Err() == nil {
		err := w.attend(ctx, log)
		if ctx.Err() == nil && err.Error() != said {
			said = err.Error()
			log.Error("cannot use the virtio-serial port; it goes on being tried", "device", w.device, "err", err)
		}
		select {
		case <-time.After(reopenEvery):
		case <-ctx.Done():
		}
	}
}

// attend has the device open until it fails.
func (w *serialWay) attend(ctx context.Context, log *slog.Logger) error {
	t, err := os.OpenFile(w.device, os.O_RDWR, 0)
	if err != nil {
		return err // EBUSY: another program has it
	}
	defer t.Close()
	defer context.AfterFunc(ctx, func() { t.Close() })()
	for p := wire.NewPort(t); ; {
		s, err := p.Dial()
		if err != nil {
			return err
		}
		log.Info("the host answers", "via", w)
		w.offer(s)
		log.Info("the session with the host is over", "err", s.Err())
	}
}

// offer has connections opened in the session until it is over.
func (w *serialWay) offer(s *wire.Session) {
	for {
		select {
		case w.sessions <- s:
		case <-s.Done():
			return
		}
	}
}
