// Package health asks a guest whether it does its work, again and again where it need not be
// well at once. It knows neither why it is asked nor what follows.
//
//	tcp        connects                                  net.Dialer, from this host
//	http       GET, answered with 200 to 399             net/http, from this host, follows nothing
//	command    exits with 0                              guest-exec, guest-exec-status
//	agent      its guest agent answers                   guest-ping
//	heartbeat  it asks for its events                    169.254.169.254, vsock, virtio-serial
package health

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"belay/agent/maint"
)

const (
	// tryTimeout bounds one try.
	tryTimeout = 3 * time.Second
	// pollEvery is how often a command in a guest is asked whether it has ended, and it is
	// looked whether a guest was heard of: nothing tells by itself.
	pollEvery = 100 * time.Millisecond
	// maxReason bounds what is kept of an answer, bytes.
	maxReason = 300
)

// Check is what is asked. One of them is set.
type Check struct {
	TCP       string   // host:port
	HTTP      string   // URL
	Command   []string // program in the guest, and its arguments
	Agent     bool     // that its guest agent answers
	Heartbeat bool     // that it asks for its events while a try lasts
}

// Pace is how often is asked, and what counts as a failure.
type Pace struct {
	WarmUp   time.Duration // after something was done to a guest it is not asked for so long
	Every    time.Duration // between tries
	Within   time.Duration // for so long at most is tried
	Failures int           // so many in a row are a failure before that is over; less than 2: one
}

// For puts a guest's name in the place of "{guest}".
func (c Check) For(guest string) Check {
	put := strings.NewReplacer("{guest}", guest).Replace
	c.TCP, c.HTTP = put(c.TCP), put(c.HTTP)
	words := make([]string, len(c.Command))
	for i, w := range c.Command {
		words[i] = put(w)
	}
	c.Command = words
	return c
}

// String tells what is asked.
func (c Check) String() string {
	switch {
	case c.TCP != "":
		return "tcp " + c.TCP
	case c.HTTP != "":
		return "http " + c.HTTP
	case c.Agent:
		return "guest agent"
	case c.Heartbeat:
		return "heartbeat"
	}
	return "command " + strings.Join(c.Command, " ")
}

// Guests is how guests are asked otherwise than over the network.
type Guests interface {
	// AgentCommand passes a command to a guest's agent (see hypervisor.Host.AgentCommand).
	AgentCommand(ctx context.Context, uuid, command string, args any) (json.RawMessage, error)
	// Heard is when a guest has last asked for its events, the zero time for never.
	Heard(uuid string) time.Time
}

// Once tries one check once, and takes 3 s at most. nil is healthy.
func Once(ctx context.Context, g Guests, uuid string, c Check) error {
	ctx, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	switch {
	case c.TCP != "":
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", c.TCP)
		if err != nil {
			return err
		}
		return conn.Close()
	case c.HTTP != "":
		return get(ctx, c.HTTP)
	case c.Agent:
		_, err := g.AgentCommand(ctx, uuid, "guest-ping", nil)
		return err
	case c.Heartbeat:
		return hear(ctx, g, uuid)
	}
	return run(ctx, g, uuid, c.Command)
}

// Until tries until the guest is healthy, has failed too often in a row, or its time is up.
// touched is when something was last done to it, the zero time for nothing.
func (p Pace) Until(ctx context.Context, touched time.Time, try func(context.Context) error) (r maint.HealthReport) {
	if !wait(ctx, time.Until(touched.Add(p.WarmUp))) {
		r.Reason = Reason(ctx.Err())
		return r
	}
	began := time.Now()
	in, cancel := context.WithTimeout(ctx, p.Within)
	defer cancel()
	for {
		err := try(in)
		// What the end of the time has cut off says less than the try before it.
		if r.Tries == 0 || err == nil || in.Err() == nil {
			r.Healthy, r.Reason = err == nil, Reason(err)
		}
		if r.Tries++; r.Healthy || r.Tries >= p.Failures || !wait(in, p.Every) {
			r.Took = time.Since(began)
			return r
		}
	}
}

// wait waits for d, and reports whether ctx is still alive.
func wait(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// Reason is what a guest says is wrong, cut to what is kept of it; "" for nil.
func Reason(err error) string {
	if err == nil {
		return ""
	}
	text := strings.ToValidUTF8(err.Error(), "?")
	return text[:min(len(text), maxReason)]
}

// get asks a URL, by a connection of its own.
func get(ctx context.Context, url string) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	r.Header.Set("User-Agent", "belayd")
	t := &http.Transport{DisableKeepAlives: true} // and no proxy
	c := http.Client{Transport: t, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	answer, err := c.Do(r)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	_, _ = io.CopyN(io.Discard, answer.Body, 1<<16)
	if answer.StatusCode < 200 || answer.StatusCode > 399 {
		return fmt.Errorf("answers %s", answer.Status)
	}
	return nil
}

// hear waits until a guest asks for its events, from now on.
func hear(ctx context.Context, g Guests, uuid string) error {
	from := time.Now()
	for {
		last := g.Heard(uuid)
		if last.After(from) {
			return nil
		}
		if !wait(ctx, pollEvery) {
			if last.IsZero() {
				return errors.New("has never asked for its events")
			}
			return fmt.Errorf("has not asked for its events for %s", time.Since(last).Round(time.Second))
		}
	}
}

// run has the guest's agent run a command. One that does not end in time goes on in the
// guest.
func run(ctx context.Context, a Guests, uuid string, command []string) error {
	var started struct {
		PID int64 `json:"pid"`
	}
	if err := ask(ctx, a, uuid, "guest-exec", map[string]any{"path": command[0], "arg": command[1:]}, &started); err != nil {
		return err
	}
	for {
		var s struct {
			Exited   bool `json:"exited"`
			ExitCode *int `json:"exitcode"`
			Signal   *int `json:"signal"`
		}
		if err := ask(ctx, a, uuid, "guest-exec-status", map[string]any{"pid": started.PID}, &s); err != nil {
			return err
		}
		switch {
		case !s.Exited:
		case s.Signal != nil:
			return fmt.Errorf("ended by signal %d", *s.Signal)
		case s.ExitCode == nil:
			return errors.New("has ended, and its agent does not say how")
		case *s.ExitCode != 0:
			return fmt.Errorf("exit code %d", *s.ExitCode)
		default:
			return nil
		}
		if !wait(ctx, pollEvery) {
			return fmt.Errorf("has not ended after %s", tryTimeout)
		}
	}
}

func ask(ctx context.Context, a Guests, uuid, command string, args, answer any) error {
	reply, err := a.AgentCommand(ctx, uuid, command, args)
	if err != nil {
		return err
	}
	return json.Unmarshal(reply, answer)
}
