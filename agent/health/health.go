// Package health asks a guest whether it does its work: by a TCP port, a URL, or a command
// that its guest agent runs. It knows neither why it is asked nor what follows.
//
//	tcp      connects                                  net.Dialer, from this host
//	http     GET, answered with 200 to 399             net/http, from this host, follows nothing
//	command  exits with 0                              guest-exec, guest-exec-status
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
	// tryEvery is the pause between tries, and pollEvery how often a command in a guest is
	// asked whether it has ended: its agent tells of nothing by itself.
	tryEvery  = 250 * time.Millisecond
	pollEvery = 100 * time.Millisecond
	// maxReason bounds what is kept of an answer, bytes.
	maxReason = 300
)

// Check is what is asked. One of TCP, HTTP and Command is set.
type Check struct {
	TCP     string   // host:port
	HTTP    string   // URL
	Command []string // program in the guest, and its arguments
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
	}
	return "command " + strings.Join(c.Command, " ")
}

// Agent passes a command to a guest's agent (see hypervisor.Host.AgentCommand).
type Agent interface {
	AgentCommand(ctx context.Context, uuid, command string, args any) (json.RawMessage, error)
}

// Once tries one check once, and takes 3 s at most. nil is healthy.
func Once(ctx context.Context, a Agent, uuid string, c Check) error {
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
	}
	return run(ctx, a, uuid, c.Command)
}

// Until tries until the guest is healthy, or for so long.
func Until(ctx context.Context, a Agent, uuid string, c Check, within time.Duration) maint.HealthReport {
	began := time.Now()
	r := maint.HealthReport{Check: c.String()}
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	for {
		err := Once(ctx, a, uuid, c)
		// What the end of the time has cut off says less than the try before it.
		if r.Tries == 0 || time.Since(began) < within && ctx.Err() == nil {
			r.Healthy, r.Reason = err == nil, Reason(err)
		}
		r.Tries++
		select {
		case <-time.After(tryEvery):
		case <-ctx.Done():
		}
		if err == nil || ctx.Err() != nil {
			r.Took = time.Since(began)
			return r
		}
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

// run has the guest's agent run a command. One that does not end in time goes on in the
// guest.
func run(ctx context.Context, a Agent, uuid string, command []string) error {
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
		select {
		case <-time.After(pollEvery):
		case <-ctx.Done():
			return fmt.Errorf("has not ended after %s", tryTimeout)
		}
	}
}

func ask(ctx context.Context, a Agent, uuid, command string, args, answer any) error {
	reply, err := a.AgentCommand(ctx, uuid, command, args)
	if err != nil {
		return err
	}
	return json.Unmarshal(reply, answer)
}
