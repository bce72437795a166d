package remote

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/patch/kexec"
	"belay/patch/live"
)

// Client has belay-kernel act. It has no deadline but those of its callers' contexts. To
// start belay-kernel takes longer than most of what it does, so one connection is kept, and
// belay-kernel with it, for whatever is asked next.
type Client struct {
	Socket string

	mu   sync.Mutex
	idle *net.UnixConn
}

var (
	_ Host         = (*Client)(nil)
	_ kexec.Loader = (*Client)(nil)

	_ live.UserSpace = (*Client)(nil)
)

// Load implements live.Kernel.
func (c *Client) Load(ctx context.Context, a live.Artifact) error {
	_, err := c.send(ctx, request{Do: doLoad}, a)
	return err
}

// send asks with a livepatch.
func (c *Client) send(ctx context.Context, r request, a live.Artifact) (answer, error) {
	fd, err := unix.MemfdCreate("livepatch", unix.MFD_CLOEXEC)
	if err != nil {
		return answer{}, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "livepatch")
	defer f.Close()
	if _, err := f.Write(a.Module); err != nil {
		return answer{}, err
	}
	r.Manifest, r.Signature = a.Manifest, a.Signature
	return c.ask(ctx, r, f)
}

// Patchable implements live.UserSpace.
func (c *Client) Patchable(ctx context.Context, q live.QEMU, a live.Artifact) error {
	_, err := c.send(ctx, request{Do: doPatchable, QEMU: &q}, a)
	return err
}

// Applied implements live.UserSpace.
func (c *Client) Applied(ctx context.Context, q live.QEMU, a live.Artifact) (bool, error) {
	r, err := c.send(ctx, request{Do: doApplied, QEMU: &q}, a)
	return r.Applied, err
}

// Set implements live.UserSpace.
func (c *Client) Set(ctx context.Context, q live.QEMU, a live.Artifact, on bool) (time.Duration, error) {
	do := doUnpatch
	if on {
		do = doPatch
	}
	r, err := c.send(ctx, request{Do: do, QEMU: &q}, a)
	return r.Stopped, err
}

// Enable implements live.Kernel.
func (c *Client) Enable(ctx context.Context, name string, on bool) error {
	do := doDisable
	if on {
		do = doEnable
	}
	_, err := c.ask(ctx, request{Do: do, Name: name}, nil)
	return err
}

// Unload implements live.Kernel.
func (c *Client) Unload(ctx context.Context, name string) error {
	_, err := c.ask(ctx, request{Do: doUnload, Name: name}, nil)
	return err
}

// KexecLoad implements kexec.Loader.
func (c *Client) KexecLoad(ctx context.Context, k maint.KernelImage) error {
	_, err := c.ask(ctx, request{Do: doKexecLoad, Image: &k}, nil)
	return err
}

// KexecUnload implements kexec.Loader.
func (c *Client) KexecUnload(ctx context.Context) error {
	_, err := c.ask(ctx, request{Do: doKexecUnload}, nil)
	return err
}

// ReloadMicrocode implements live.Microcode.
func (c *Client) ReloadMicrocode(ctx context.Context) error {
	_, err := c.ask(ctx, request{Do: doMicrocode}, nil)
	return err
}

// Tasks implements live.Witness.
func (c *Client) Tasks(ctx context.Context, functions []string) ([]maint.KernelTask, error) {
	a, err := c.ask(ctx, request{Do: doTasks, Functions: functions}, nil)
	return a.Tasks, err
}

// KernelLog implements live.Witness.
func (c *Client) KernelLog(ctx context.Context, after uint64) ([]live.Line, error) {
	a, err := c.ask(ctx, request{Do: doLog, After: after}, nil)
	return a.Log, err
}

// LogEnd implements live.Witness.
func (c *Client) LogEnd(ctx context.Context) (uint64, error) {
	a, err := c.ask(ctx, request{Do: doLogEnd}, nil)
	return a.LogEnd, err
}

// ask sends one request and reads its answer. When the connection is lost nobody knows what
// was done: callers look. Only where it had been kept it is asked again: belay-kernel may
// have ended meanwhile, and to meet a request twice does the kernel no harm. That is not said
// of QEMUs.
func (c *Client) ask(ctx context.Context, r request, file *os.File) (a answer, err error) {
	if r.QEMU == nil && c.alive(ctx) {
		if conn := c.take(); conn != nil {
			if a, err = c.exchange(ctx, conn, r, file); err == nil {
				return a, a.err()
			}
		}
	}
	if ctx.Err() != nil {
		return a, ctx.Err()
	}
	conn, err := new(net.Dialer).DialContext(ctx, "unix", c.Socket)
	if err != nil {
		return a, maint.Problemf(maint.CodeNoHelper, "belay-kernel", "systemctl enable --now belay-kernel.socket, or set patch.helper in belayd's configuration",
			"cannot be reached on %s: %v", c.Socket, errors.Unwrap(err))
	}
	a, err = c.exchange(ctx, conn.(*net.UnixConn), r, file)
	switch {
	case err == nil:
		return a, a.err()
	case ctx.Err() != nil:
		return a, ctx.Err()
	}
	return a, maint.Problemf(maint.CodeNoHelper, "belay-kernel", "systemctl status belay-kernel.socket; it says why in the journal (journalctl -u 'belay-kernel@*')",
		"gives no answer on %s: %v", c.Socket, err)
}

// aliveWithin is far more than belay-kernel takes to answer when there is nothing to do.
const aliveWithin = time.Second

// alive reports whether who is at the other end of the connection that is kept answers; if not,
// none is kept any more. It may have been stopped, or frozen, for however long.
func (c *Client) alive(ctx context.Context) bool {
	conn := c.take()
	if conn == nil {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, aliveWithin)
	defer cancel()
	_, err := c.exchange(ctx, conn, request{Do: doNothing}, nil)
	return err == nil
}

// exchange asks on a connection, which it keeps for the next request or ends.
func (c *Client) exchange(ctx context.Context, conn *net.UnixConn, r request, file *os.File) (a answer, err error) {
	stay := context.AfterFunc(ctx, func() { conn.Close() })
	defer func() {
		if stay() && err == nil {
			c.keep(conn)
		} else {
			conn.Close()
		}
	}()
	line, err := json.Marshal(r)
	if err != nil {
		return a, err
	}
	line = append(line, '\n')
	var rights []byte
	if file != nil {
		rights = unix.UnixRights(int(file.Fd()))
	}
	n, _, err := conn.WriteMsgUnix(line, rights, nil)
	if err == nil && n < len(line) {
		_, err = conn.Write(line[n:])
	}
	if err != nil {
		return a, err
	}
	if err := json.NewDecoder(conn).Decode(&a); err != nil {
		return a, fmt.Errorf("cannot read its answer: %w", err)
	}
	return a, nil
}

// take gives the connection that is kept; nil: there is none.
func (c *Client) take() *net.UnixConn {
	c.mu.Lock()
	defer c.mu.Unlock()
	conn := c.idle
	c.idle = nil
	return conn
}

// keep keeps a connection, unless one is.
func (c *Client) keep(conn *net.UnixConn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.idle != nil {
		conn.Close()
		return
	}
	c.idle = conn
}
