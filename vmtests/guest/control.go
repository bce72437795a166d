package guest

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"belay/vmtests/probe"
)

// callTimeout bounds a call whose context has no deadline.
const callTimeout = 2 * time.Minute

// Control is a connection to a guest's probe. Its methods may be used side by
// side. A connection does not survive a migration: dial again, on the other
// host.
type Control struct {
	conn   net.Conn
	prefix string // of this client's request ids
	next   atomic.Uint64

	writing sync.Mutex

	mu      sync.Mutex
	pending map[string]chan probe.Reply
	err     error // why the connection ended
}

// Dial connects to the probe of a guest that runs on h. QEMU serves one client
// at a time: a second one connects, but is not answered until the first has
// closed.
func Dial(ctx context.Context, h Host, name string) (*Control, error) {
	c, err := dial(ctx, h, name)
	if err != nil {
		return nil, fmt.Errorf("cannot reach probe of guest %s: %w", name, err)
	}
	return c, nil
}

func dial(ctx context.Context, h Host, name string) (*Control, error) {
	out, err := h.Virsh(ctx, "dumpxml", name)
	if err != nil {
		return nil, err
	}
	path, err := channelPath(out, probe.PortName)
	if err != nil {
		return nil, err
	}
	conn, err := h.DialUnix(ctx, path)
	if err != nil {
		return nil, err
	}
	return newControl(conn), nil
}

// channelPath finds a channel's socket in the XML of a running domain.
func channelPath(domain, channel string) (string, error) {
	var d struct {
		Channels []struct {
			Source struct {
				Path string `xml:"path,attr"`
			} `xml:"source"`
			Target struct {
				Name string `xml:"name,attr"`
			} `xml:"target"`
		} `xml:"devices>channel"`
	}
	if err := xml.Unmarshal([]byte(domain), &d); err != nil {
		return "", fmt.Errorf("parse domain XML: %w", err)
	}
	for _, c := range d.Channels {
		if c.Target.Name == channel && c.Source.Path != "" {
			return c.Source.Path, nil
		}
	}
	return "", fmt.Errorf("no socket of channel %s in the domain XML: the guest does not run here", channel)
}

func newControl(conn net.Conn) *Control {
	c := &Control{conn: conn, prefix: rand.Text(), pending: map[string]chan probe.Reply{}}
	go c.read()
	return c
}

// read hands each reply to the call that waits for it. Replies that no one
// waits for are answers to an earlier client, or came too late; lines that are
// no reply are what was left of one.
func (c *Control) read() {
	r := bufio.NewReader(c.conn)
	for {
		line, err := r.ReadBytes('\n')
		var reply probe.Reply
		if json.Unmarshal(line, &reply) == nil {
			c.mu.Lock()
			if ch := c.pending[reply.ID]; ch != nil {
				delete(c.pending, reply.ID)
				ch <- reply // has room for it
			}
			c.mu.Unlock()
		}
		if err != nil {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.err = fmt.Errorf("connection ended: %w", err)
			for id, ch := range c.pending {
				close(ch)
				delete(c.pending, id)
			}
			return
		}
	}
}

// Close ends the connection and all calls under way.
func (c *Control) Close() error { return c.conn.Close() }

// call sends one request and waits for its reply.
func (c *Control) call(ctx context.Context, cmd string, args, result any) error {
	if err := c.exchange(ctx, cmd, args, result); err != nil {
		return fmt.Errorf("probe: %s: %w", cmd, err)
	}
	return nil
}

func (c *Control) exchange(ctx context.Context, cmd string, args, result any) error {
	if _, bounded := ctx.Deadline(); !bounded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, callTimeout)
		defer cancel()
	}
	req := probe.Request{ID: c.prefix + strconv.FormatUint(c.next.Add(1), 10), Cmd: cmd}
	if args != nil {
		var err error
		if req.Args, err = json.Marshal(args); err != nil {
			return err
		}
	}
	line, err := json.Marshal(req)
	if err != nil {
		return err
	}
	ch := make(chan probe.Reply, 1)
	c.mu.Lock()
	if c.err != nil {
		defer c.mu.Unlock()
		return c.err
	}
	c.pending[req.ID] = ch
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.pending, req.ID)
	}()

	// A request is short and fits the socket's buffer, so the lock is not
	// held for long; if the guest reads nothing at all, ctx frees it. The
	// line break in front ends what a client before us was cut off in.
	line = append(append([]byte{'\n'}, line...), '\n')
	if err := c.write(ctx, line); err != nil {
		return err
	}
	select {
	case reply, ok := <-ch:
		return c.finish(reply, ok, result)
	case <-ctx.Done():
		return fmt.Errorf("no answer from the guest: %w", ctx.Err())
	}
}

func (c *Control) write(ctx context.Context, line []byte) error {
	c.writing.Lock()
	defer c.writing.Unlock()
	deadline, _ := ctx.Deadline() // there is one
	if err := c.conn.SetWriteDeadline(deadline); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { c.conn.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := c.conn.Write(line); err != nil {
		return errors.Join(err, ctx.Err())
	}
	return nil
}

func (c *Control) finish(reply probe.Reply, ok bool, result any) error {
	if !ok {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.err
	}
	if reply.Error != "" {
		return errors.New(reply.Error)
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal(reply.Result, result)
}

// Status asks how the guest is.
func (c *Control) Status(ctx context.Context) (r probe.Status, err error) {
	return r, c.call(ctx, probe.CmdStatus, nil, &r)
}

// Dirty sets how the guest dirties its memory. A new working set starts afresh.
func (c *Control) Dirty(ctx context.Context, s probe.DirtySettings) (r probe.MemoryStatus, err error) {
	return r, c.call(ctx, probe.CmdDirty, s, &r)
}

// Verify has the guest check all its memory.
func (c *Control) Verify(ctx context.Context) (r probe.MemoryReport, err error) {
	return r, c.call(ctx, probe.CmdVerify, nil, &r)
}

// Corrupt flips a bit in the guest's memory, for Verify to find.
func (c *Control) Corrupt(ctx context.Context, s probe.CorruptSettings) error {
	return c.call(ctx, probe.CmdCorrupt, s, nil)
}

// DiskWrite writes a pattern to the guest's disk and flushes it.
func (c *Control) DiskWrite(ctx context.Context, s probe.DiskSettings) (r probe.DiskReport, err error) {
	return r, c.call(ctx, probe.CmdDiskWrite, s, &r)
}

// DiskVerify reads a pattern back and compares it.
func (c *Control) DiskVerify(ctx context.Context, s probe.DiskSettings) (r probe.DiskReport, err error) {
	return r, c.call(ctx, probe.CmdDiskVerify, s, &r)
}

// Heartbeat sets where heartbeats go and how often.
func (c *Control) Heartbeat(ctx context.Context, s probe.HeartbeatSettings) (r probe.HeartbeatStatus, err error) {
	return r, c.call(ctx, probe.CmdHeartbeat, s, &r)
}

// Kmsg asks what the guest's kernel complained about.
func (c *Control) Kmsg(ctx context.Context) (r probe.KmsgReport, err error) {
	return r, c.call(ctx, probe.CmdKmsg, nil, &r)
}

// Clock reads the guest's clocks.
func (c *Control) Clock(ctx context.Context) (r probe.ClockReading, err error) {
	return r, c.call(ctx, probe.CmdClock, nil, &r)
}
