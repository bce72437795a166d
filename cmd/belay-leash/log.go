package main

import (
	"bytes"
	"io"
	"log/slog"
	"log/syslog"
	"os"
	"time"
)

const (
	// logRoom is how many lines wait to be written.
	logRoom = 256
	// logFlush bounds the wait for them when the process ends.
	logFlush = time.Second
)

// newLog logs as text to w, which is stderr, and what is an alarm also to
// syslog, unless journald reads w. None of them can hold the leash up. flush
// waits for what was logged, for a while.
func newLog(w io.Writer) (log *slog.Logger, flush func()) {
	if os.Getenv("JOURNAL_STREAM") != "" {
		out := newPatient(journal{w})
		return slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{ReplaceAttr: withoutTime})), out.flush
	}
	out := newPatient(w)
	alarms, err := syslog.New(syslog.LOG_DAEMON|syslog.LOG_CRIT, "belay-leash")
	if err != nil { // there is no syslog
		return slog.New(slog.NewTextHandler(out, nil)), out.flush
	}
	sys := newPatient(alarmsOnly{alarms})
	return slog.New(slog.NewTextHandler(io.MultiWriter(out, sys), nil)), func() { out.flush(); sys.flush() }
}

// patient writes what it can and drops the rest: a reader that has stopped, be
// it journald, must not keep a guest paused.
type patient struct {
	lines chan []byte // nil is the last
	done  chan struct{}
}

func newPatient(w io.Writer) *patient {
	p := &patient{make(chan []byte, logRoom), make(chan struct{})}
	go func() {
		defer close(p.done)
		for line := range p.lines {
			if line == nil {
				return
			}
			_, _ = w.Write(line)
		}
	}()
	return p
}

// Write implements io.Writer. It never waits and never fails.
func (p *patient) Write(b []byte) (int, error) {
	select {
	case p.lines <- append([]byte{}, b...):
	default:
	}
	return len(b), nil
}

func (p *patient) flush() {
	late := time.After(logFlush)
	select {
	case p.lines <- nil:
	case <-late:
		return
	}
	select {
	case <-p.done:
	case <-late:
	}
}

// journal tells journald how bad each line is (sd-daemon(3)).
type journal struct{ io.Writer }

func (j journal) Write(line []byte) (int, error) {
	priority := "<6>"
	switch levelOf(line) {
	case "ERROR":
		priority = "<2>" // guests stand still
	case "WARN":
		priority = "<4>"
	}
	if _, err := j.Writer.Write(append([]byte(priority), line...)); err != nil {
		return 0, err
	}
	return len(line), nil
}

// alarmsOnly drops what is none.
type alarmsOnly struct{ io.Writer }

func (a alarmsOnly) Write(line []byte) (int, error) {
	if levelOf(line) != "ERROR" {
		return len(line), nil
	}
	return a.Writer.Write(line)
}

// levelOf finds the level in a line of slog.TextHandler's, where nothing but
// the time comes before it.
func levelOf(line []byte) string {
	_, after, _ := bytes.Cut(line, []byte("level="))
	level, _, _ := bytes.Cut(after, []byte(" "))
	return string(level)
}

func withoutTime(groups []string, a slog.Attr) slog.Attr {
	if len(groups) == 0 && a.Key == slog.TimeKey {
		return slog.Attr{}
	}
	return a
}
