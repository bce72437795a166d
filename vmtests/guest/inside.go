package guest

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// execPoll is how often a guest's agent is asked for a program's end: it tells of none.
const execPoll = 50 * time.Millisecond

// AgentCommand asks a guest's agent by virsh, and decodes what it returns.
func AgentCommand(ctx context.Context, h Host, name, command string, args, result any) error {
	b, err := json.Marshal(map[string]any{"execute": command, "arguments": args})
	if err != nil {
		return err
	}
	text, err := h.Virsh(ctx, "qemu-agent-command", "--timeout", "20", name, string(b))
	if err != nil {
		return err
	}
	return json.Unmarshal([]byte(text), &struct{ Return any }{result})
}

// Inside runs a program in a guest through its agent, with input, and gives what it prints.
func Inside(ctx context.Context, h Host, name, input string, argv ...string) (out string, err error) {
	var started struct{ PID int }
	args := map[string]any{"path": argv[0], "arg": argv[1:], "capture-output": true, "input-data": base64.StdEncoding.EncodeToString([]byte(input))}
	if err := AgentCommand(ctx, h, name, "guest-exec", args, &started); err != nil {
		return "", err
	}
	for {
		var s struct {
			Exited   bool
			ExitCode int    `json:"exitcode"`
			Signal   int    `json:"signal"`
			Out      []byte `json:"out-data"`
			Err      []byte `json:"err-data"`
		}
		if err := AgentCommand(ctx, h, name, "guest-exec-status", map[string]any{"pid": started.PID}, &s); err != nil {
			return "", err
		}
		if s.Exited {
			if s.ExitCode != 0 || s.Signal != 0 {
				err = fmt.Errorf("%s in guest %s ended with %d, signal %d: %s", argv, name, s.ExitCode, s.Signal, s.Err)
			}
			return string(s.Out), err
		}
		select {
		case <-time.After(execPoll):
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
}

// EventsPath is where Azure's clients ask for scheduled events, and approve them.
const EventsPath = "/metadata/scheduledevents?api-version=2020-07-01"

// ScheduledEvents is what they read there.
type ScheduledEvents struct {
	DocumentIncarnation uint64
	Events              []ScheduledEvent
}

// ScheduledEvent is one of them.
type ScheduledEvent struct {
	EventID           string `json:"EventId"`
	EventType         string
	Resources         []string
	EventStatus       string
	NotBefore         string
	DurationInSeconds int
}

// Approval is what they send to approve an event.
func Approval(event string) string { return `{"StartRequests":[{"EventId":"` + event + `"}]}` }

// Metadata asks the metadata service from inside a guest, as Azure's clients do: with a
// body, it is a POST; told that it asks too often, it waits as long as the answer says.
func Metadata(ctx context.Context, h Host, name, path, body string) (string, error) {
	for {
		answer, again, err := metadata(ctx, h, name, path, body)
		if again == 0 {
			return answer, err
		}
		select {
		case <-time.After(again):
		case <-ctx.Done():
			return answer, err
		}
	}
}

// metadata also tells after what time the guest may ask again, if it asked too often.
func metadata(ctx context.Context, h Host, name, path, body string) (text string, again time.Duration, err error) {
	method := http.MethodGet
	if body != "" {
		method = http.MethodPost
	}
	request := fmt.Sprintf("%s %s HTTP/1.0\r\nHost: 169.254.169.254\r\nMetadata: true\r\nContent-Length: %d\r\n\r\n%s", method, path, len(body), body)
	// Debian's static wget looks for libraries that the guest does not have.
	out, err := Inside(ctx, h, name, request, "/bin/busybox", "nc", "-w", "10", "169.254.169.254", "80")
	if err != nil {
		return "", 0, err
	}
	r, err := http.ReadResponse(bufio.NewReader(strings.NewReader(out)), nil)
	if err != nil {
		return "", 0, fmt.Errorf("%w: %q", err, out)
	}
	defer r.Body.Close()
	answer, err := io.ReadAll(r.Body)
	if err == nil && r.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", r.Status, answer)
	}
	if r.StatusCode == http.StatusTooManyRequests {
		seconds, _ := strconv.Atoi(r.Header.Get("Retry-After"))
		again = time.Duration(seconds) * time.Second
	}
	return string(answer), again, err
}
