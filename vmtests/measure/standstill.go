package measure

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"time"

	"belay/vmtests/cluster"
)

// Standstill is one time in which a guest's vCPUs stood still, by QEMU's own
// clock, which is the machine's: from its event STOP to its event RESUME.
type Standstill struct{ Stopped, Resumed time.Time }

// Length is how long it took.
func (s Standstill) Length() time.Duration { return s.Resumed.Sub(s.Stopped) }

// qemuEvents are STOP and RESUME of all guests of a host, as virsh tells them.
// Their times are QEMU's, so it does not matter how late they are told.
type qemuEvents struct {
	end   context.CancelFunc
	ended chan error
	queue chan qemuEvent
}

type qemuEvent struct {
	name, guest string
	at          time.Time
}

// eventLine is a line of virsh qemu-monitor-event.
var eventLine = regexp.MustCompile(`^event (STOP|RESUME) at (\d+)\.(\d+) for domain '([^']+)'`)

// listenQEMU begins to listen. The first events may be missed: nothing tells
// when virsh has registered for them.
func listenQEMU(n *cluster.Node) (*qemuEvents, error) {
	ctx, cancel := context.WithCancel(context.Background())
	// stdbuf: virsh keeps lines back that do not go to a terminal.
	cmd := exec.CommandContext(ctx, "stdbuf", "--output=L", "virsh", "-q", "-c", n.URI(),
		"qemu-monitor-event", "--loop", "--regex", "--event", "^(STOP|RESUME)$")
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		cancel()
		return nil, fmt.Errorf("cannot listen for QEMU's events: %w", err)
	}
	q := &qemuEvents{end: cancel, ended: make(chan error, 1), queue: make(chan qemuEvent, 10_000)}
	go func() {
		defer close(q.queue)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if e, ok := parseEvent(lines.Text()); ok {
				q.queue <- e
			}
		}
		q.ended <- cmd.Wait()
	}()
	return q, nil
}

func parseEvent(line string) (e qemuEvent, ok bool) {
	f := eventLine.FindStringSubmatch(line)
	if f == nil {
		return e, false
	}
	sec, err := strconv.ParseInt(f[2], 10, 64)
	micro, err2 := strconv.ParseInt(f[3], 10, 64)
	return qemuEvent{f[1], f[4], time.Unix(sec, micro*1000)}, errors.Join(err, err2) == nil
}

func (q *qemuEvents) close() { q.end() }

// since waits until each of n guests has stopped and resumed, and gives the
// first standstill of each that began after begin.
func (q *qemuEvents) since(ctx context.Context, begin time.Time, n int) (map[string]Standstill, error) {
	found := make(map[string]Standstill)
	for left := n; left > 0; {
		select {
		case e, ok := <-q.queue:
			if !ok {
				return nil, fmt.Errorf("virsh qemu-monitor-event has ended: %w", <-q.ended)
			}
			s := found[e.guest]
			switch {
			case e.at.Before(begin):
			case e.name == "STOP" && s.Stopped.IsZero():
				s.Stopped = e.at
			case e.name == "RESUME" && !s.Stopped.IsZero() && s.Resumed.IsZero():
				s.Resumed = e.at
				left--
			}
			found[e.guest] = s
		case <-ctx.Done():
			return nil, fmt.Errorf("only %d guests were seen to stop and resume: %w", len(found), ctx.Err())
		}
	}
	return found, nil
}
