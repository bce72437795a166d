package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/agenttest"
	"belay/agent/maint"
)

// terminal is a pseudo-terminal of 60 by 12: what is written to the file comes back out of
// the lookup.
func terminal(t *testing.T) (*os.File, *lookup) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	fd := int(master.Fd())
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { slave.Close() })
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 12, Col: 60}); err != nil {
		t.Fatal(err)
	}
	seen := &lookup{grown: make(chan struct{})}
	go func() {
		for b := make([]byte, 4096); ; {
			n, err := master.Read(b)
			if err != nil {
				return
			}
			_, _ = seen.Write(b[:n])
		}
	}()
	return slave, seen
}

func TestTopOnATerminal(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, slog.New(slog.DiscardHandler), nil, "a", "b")
	n := w.Nodes[0]
	for i := range 30 {
		n.Host.PutGuest(fmt.Sprintf("web-%02d", i))
	}
	f, seen := terminal(t)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	a := &app{out: f, err: f, socket: n.Config.API.Socket, format: "table"}
	go func() { done <- a.top(ctx, f, topLeast) }()
	await := func(want string) {
		t.Helper()
		if !seen.await(regexp.MustCompile(want), patience) {
			t.Fatalf("%s is not drawn in %q", want, seen)
		}
	}
	await(`(?s)\x1b\[2J.*\x1b\[Ha at .*web-00 .*… \d+ lines more.*\x1b\[J.*\x1b\[Ha at`)
	n.Stop()
	await(`belayd does not answer, waiting for it: `)
	n.Start(nil)
	await(`(?s)does not answer.*\x1b\[Ha at`)
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	await(`\x1b\[\?25h$`)

	n.Stop()
	if err := a.top(t.Context(), f, topLeast); err == nil {
		t.Error("a belayd that was never seen is waited for")
	}
}

func TestScreen(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name          string
		text          string
		width, height int
		want          []string
	}{
		{"all of it", "a\nb\n", 10, 5, []string{"a", "b"}},
		{"too long", "a\nb\nc\nd\n", 40, 4, []string{"a", "b", "… 2 lines more"}},
		{"too wide", "äöüäöü\nb\n", 4, 5, []string{"äöü…", "b"}},
		{"no room", "a\nb\nc\n", 30, 1, []string{"… 3 lines more"}},
	} {
		got := screen(c.text, c.width, c.height)
		want := "\x1b[H" + strings.Join(c.want, "\x1b[K\r\n") + "\x1b[K\r\n\x1b[J"
		if got != want {
			t.Errorf("%s: %q, want %q", c.name, got, want)
		}
	}
}

func TestHostViewObeysNobody(t *testing.T) {
	t.Parallel()
	evil := "x\x1b[2J\ty\n"
	now := time.Now()
	v := hostView{Status: maint.Status{Now: now, Host: maint.Host{Name: evil}, Conditions: []maint.Condition{{Text: evil}}, Peers: []maint.PeerStatus{{Name: evil}},
		Cordon: &maint.Cordon{Reason: evil}, Operations: []maint.Op{
			{ID: "mig-1", Guest: evil, By: evil, State: maint.OpRunning, Step: "perform", Started: now, Progress: &maint.Job{MemoryTotal: 1 << 30, MemoryLeft: 1 << 28}, Trouble: maint.Problemf("c", evil, "", "%s", evil)},
			{ID: "drain-1", State: maint.OpRunning, Step: "evacuate", Started: now, Moves: []maint.GuestMove{{State: maint.MoveMoved}, {State: maint.MoveMoving}}}}},
		Guests: maint.Inventory{Stale: evil, Guests: []maint.Guest{{Name: "off", State: maint.GuestShutoff}, {Name: evil, State: maint.GuestRunning, Job: evil}}},
		Events: []maint.ScheduledEvent{{Guests: []maint.EventGuest{{Name: evil}, {Name: "b"}}, Approval: &maint.EventApproval{By: evil}}}}
	var b strings.Builder
	v.rows(&b)
	if strings.ContainsAny(b.String(), "\x1b") {
		t.Errorf("a terminal obeys %q", b.String())
	}
	for _, want := range []string{"[###############-----] 75 %", "[##########----------] 50 %", `x\u001b[2J\u0009y\u000a,b`} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %s in\n%s", want, b.String())
		}
	}
	lines := strings.Split(b.String(), "\n")
	first := slices.IndexFunc(lines, func(l string) bool { return strings.HasPrefix(l, "GUEST\t") })
	if first < 0 || !strings.HasPrefix(lines[first+1], `x\u001b`) {
		t.Errorf("the guest with a job is not the first of\n%s", b.String())
	}
}
