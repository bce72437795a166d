package vmm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"
)

// StateLimit is more than the state of devices, video memory too, ever takes, bytes. A
// stream that is longer has the guest's memory in it.
const StateLimit = 1 << 30

// listen makes a socket in a domain's folder that QEMU, as the user given, can
// connect to. path is inside the host.
func (p Places) listen(id int, name string, uid, gid int) (ln *net.UnixListener, path string, err error) {
	if path, err = p.socket(id, name); err != nil {
		return nil, "", err
	}
	_ = os.Remove(p.at(path)) // of a belayd that died
	ln, err = net.ListenUnix("unix", &net.UnixAddr{Name: p.at(path), Net: "unix"})
	if err != nil {
		return nil, "", err
	}
	if err := errors.Join(os.Chmod(p.at(path), 0o600), os.Chown(p.at(path), uid, gid)); err != nil {
		ln.Close()
		return nil, "", err
	}
	return ln, path, nil
}

// receipt is a stream that is being received.
type receipt struct {
	done  chan struct{}
	state []byte // when done
	err   error
}

// receive takes one connection and reads it to its end, in the background. It
// ends with ctx, or when the listener is closed before there is a connection.
func receive(ctx context.Context, ln *net.UnixListener) *receipt {
	r := &receipt{done: make(chan struct{})}
	go func() {
		defer close(r.done)
		stop := context.AfterFunc(ctx, func() { ln.SetDeadline(time.Unix(1, 0)) })
		defer stop()
		conn, err := ln.Accept()
		if err != nil {
			r.err = errors.Join(err, context.Cause(ctx))
			return
		}
		defer conn.Close()
		cut := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
		defer cut()
		var b bytes.Buffer
		n, err := io.Copy(&b, io.LimitReader(conn, StateLimit))
		if err == nil && n == StateLimit {
			err = fmt.Errorf("QEMU sends more than %d MiB: not the state of devices alone", StateLimit>>20)
		}
		r.state, r.err = b.Bytes(), err
	}()
	return r
}

// send connects to a socket that QEMU listens on, writes the state and closes.
func send(ctx context.Context, path string, state []byte) error {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := conn.Write(state); err != nil {
		return err
	}
	return conn.Close()
}
