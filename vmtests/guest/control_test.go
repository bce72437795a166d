package guest

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"belay/vmtests/probe"
)

// fakeProbe answers each request that is one with what answer writes.
func fakeProbe(t *testing.T, answer func(r probe.Request, send func(string))) *Control {
	t.Helper()
	near, far := net.Pipe()
	c := newControl(near)
	t.Cleanup(func() { c.Close(); far.Close() })
	go func() {
		r := bufio.NewReader(far)
		for {
			line, err := r.ReadBytes('\n')
			if err != nil {
				return
			}
			var req probe.Request
			if json.Unmarshal(line, &req) == nil {
				answer(req, func(s string) { fmt.Fprint(far, s) })
			}
		}
	}()
	return c
}

// What a client before this one left in the channel is not mistaken for an
// answer.
func TestControlIgnoresTheStale(t *testing.T) {
	c := fakeProbe(t, func(r probe.Request, send func(string)) {
		send("estore\":1}}\n")
		send(`{"id":"someone else's","result":{"guest":"wrong"}}` + "\n")
		send(`{"id":"` + r.ID + `","result":{"guest":"ha`) // cut off
		send("\n" + `{"id":"` + r.ID + `","result":{"guest":"right"}}` + "\n")
	})
	for range 3 {
		if st, err := c.Status(t.Context()); err != nil || st.Guest != "right" {
			t.Errorf("%+v, %v", st, err)
		}
	}
}

func TestControlErrors(t *testing.T) {
	c := fakeProbe(t, func(r probe.Request, send func(string)) {
		switch r.Cmd {
		case probe.CmdStatus: // silence
		default:
			send(`{"id":"` + r.ID + `","error":"no disk"}` + "\n")
		}
	})
	if _, err := c.DiskWrite(t.Context(), probe.DiskSettings{}); err == nil || !strings.Contains(err.Error(), "no disk") {
		t.Errorf("the probe's error: %v", err)
	}
	short, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := c.Status(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("silence: %v", err)
	}
	ended := make(chan error, 1)
	go func() { _, err := c.Status(t.Context()); ended <- err }()
	c.Close()
	if err := <-ended; err == nil {
		t.Error("a call outlived its connection")
	}
	if _, err := c.Verify(t.Context()); err == nil {
		t.Error("a call on a closed connection")
	}
}

// A guest that reads nothing must not hold a call beyond its deadline.
func TestControlDoesNotHangInWrite(t *testing.T) {
	near, far := net.Pipe() // no buffer: a write waits for a reader
	defer far.Close()
	c := newControl(near)
	defer c.Close()
	for _, stop := range []func() (context.Context, context.CancelFunc){
		func() (context.Context, context.CancelFunc) {
			return context.WithTimeout(t.Context(), 10*time.Millisecond)
		},
		func() (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(10*time.Millisecond, cancel)
			return ctx, cancel
		},
	} {
		ctx, cancel := stop()
		if _, err := c.Status(ctx); err == nil {
			t.Error("answered by nobody")
		}
		cancel()
	}
}
