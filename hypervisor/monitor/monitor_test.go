package monitor

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}` + "\r\n"

// qemu is the other end: it greets, and gives each command to answer, which
// returns what is written, "" for nothing.
func qemu(t *testing.T, answer func(command string, id int) string) (path string) {
	t.Helper()
	return serve(t, func(c net.Conn) {
		_, _ = io.WriteString(c, greeting)
		for in := bufio.NewScanner(c); in.Scan(); {
			var is struct {
				Execute string `json:"execute"`
				ID      int    `json:"id"`
			}
			if err := json.Unmarshal(in.Bytes(), &is); err != nil {
				t.Errorf("command %q: %v", in.Bytes(), err)
			}
			text := fmt.Sprintf(`{"return": {}, "id": %d}`+"\r\n", is.ID)
			if is.Execute != "qmp_capabilities" {
				text = answer(is.Execute, is.ID)
			}
			if _, err := io.WriteString(c, text); err != nil {
				return
			}
		}
	})
}

func serve(t *testing.T, f func(net.Conn)) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "monitor.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = c.Close() }()
				f(c)
			}()
		}
	}()
	return path
}

func dial(t *testing.T, path string) *Monitor {
	t.Helper()
	m, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = m.Close() })
	return m
}

// machine is a QEMU in a run state, which counts the conts that it gets.
type machine struct {
	state string
	after string // the state that cont leads to
	conts int
}

func (q *machine) answer(command string, id int) string {
	switch command {
	case "query-status":
		return fmt.Sprintf(`{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "RTC_CHANGE", "data": {"offset": 0}}`+"\r\n"+
			`{"return": {"status": "nobody's", "running": false}, "id": %d}`+"\r\n"+
			`{"return": {"status": %q, "singlestep": false, "running": %t}, "id": %d}`+"\r\n", id-1, q.state, q.state == Running, id)
	case "query-uuid":
		return fmt.Sprintf(`{"return": {"UUID": "2f6f2b51-0b5c-4a0c-9d0e-0d9d3a1b7c11"}, "id": %d}`+"\r\n", id)
	case "cont":
		q.conts++
		if q.after == "" {
			return fmt.Sprintf(`{"id": %d, "error": {"class": "GenericError", "desc": "Resetting the Virtual Machine is required"}}`+"\r\n", id)
		}
		q.state = q.after
		return fmt.Sprintf(`{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "RESUME"}`+"\r\n"+`{"return": {}, "id": %d}`+"\r\n", id)
	}
	return fmt.Sprintf(`{"id": %d, "error": {"class": "CommandNotFound", "desc": "The command %s has not been found"}}`+"\r\n", id, command)
}

func TestAsks(t *testing.T) {
	m := dial(t, qemu(t, (&machine{state: "prelaunch"}).answer))
	for range 3 {
		if uuid, err := m.UUID(t.Context()); err != nil || uuid != "2f6f2b51-0b5c-4a0c-9d0e-0d9d3a1b7c11" {
			t.Errorf("UUID %q, %v", uuid, err)
		}
		if state, err := m.Status(t.Context()); err != nil || state != "prelaunch" {
			t.Errorf("state %q, %v", state, err)
		}
	}
}

func TestCont(t *testing.T) {
	for _, tt := range []struct {
		state, after string
		takeBack     bool
		conts        int
		says         string // in the error; "": none
		is           error
	}{
		{state: "paused", after: "running", conts: 1},
		{state: "running"},
		{state: "postmigrate", takeBack: true, after: "running", conts: 1},
		{state: "running", takeBack: true},
		{state: "postmigrate", says: "postmigrate", is: ErrNotPaused},
		{state: "paused", takeBack: true, says: "paused", is: ErrNotPaused},
		{state: "inmigrate", says: "inmigrate", is: ErrNotPaused},
		{state: "finish-migrate", says: "finish-migrate", is: ErrNotPaused},
		{state: "io-error", says: "io-error", is: ErrNotPaused},
		{state: "guest-panicked", says: "guest-panicked", is: ErrNotPaused},
		{state: "paused", after: "io-error", conts: 1, says: "io-error"},
		{state: "paused", conts: 1, says: "Resetting the Virtual Machine is required"},
	} {
		t.Run(fmt.Sprintf("%s to %s, take back %t", tt.state, tt.after, tt.takeBack), func(t *testing.T) {
			q := &machine{state: tt.state, after: tt.after}
			m := dial(t, qemu(t, q.answer))
			cont := m.Cont
			if tt.takeBack {
				cont = m.TakeBack
			}
			err := cont(t.Context())
			if (err == nil) != (tt.says == "") || err != nil && !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error %v, want one that says %q", err, tt.says)
			}
			if tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("error %v does not wrap %v", err, tt.is)
			}
			if q.conts != tt.conts {
				t.Errorf("%d conts, want %d", q.conts, tt.conts)
			}
		})
	}
}

// Whatever is at the other end, a call ends, and with an error.
func TestStrangers(t *testing.T) {
	long := strings.Repeat("x", 10*lineMax)
	for name, tt := range map[string]struct {
		talk func(net.Conn)
		is   error
	}{
		"says nothing":           {func(c net.Conn) { _, _ = io.Copy(io.Discard, c) }, ErrTaken},
		"hangs up":               {func(net.Conn) {}, nil},
		"no JSON":                {func(c net.Conn) { _, _ = io.WriteString(c, "SSH-2.0-OpenSSH_9.2\r\n") }, nil},
		"no greeting":            {func(c net.Conn) { _, _ = io.WriteString(c, `{"return": {}}`+"\n") }, nil},
		"a list":                 {func(c net.Conn) { _, _ = io.WriteString(c, "[1, 2]\n") }, nil},
		"types that are not its": {func(c net.Conn) { _, _ = io.WriteString(c, `{"QMP": {}, "id": "one"}`+"\n") }, nil},
		"deep":                   {func(c net.Conn) { _, _ = io.WriteString(c, strings.Repeat("[", lineMax/2)+"\n") }, nil},
		"an endless line": {func(c net.Conn) {
			for {
				if _, err := io.WriteString(c, long); err != nil {
					return
				}
			}
		}, nil},
		"a drop at a time": {func(c net.Conn) {
			for {
				if _, err := io.WriteString(c, " "); err != nil {
					return
				}
				time.Sleep(10 * time.Millisecond)
			}
		}, ErrTaken},
		"endless events": {func(c net.Conn) {
			_, _ = io.WriteString(c, greeting)
			for {
				if _, err := io.WriteString(c, `{"event": "RESUME"}`+"\n"); err != nil {
					return
				}
			}
		}, context.DeadlineExceeded},
		"no answer": {func(c net.Conn) {
			_, _ = io.WriteString(c, greeting)
			_, _ = io.Copy(io.Discard, c)
		}, context.DeadlineExceeded},
		"half an answer": {func(c net.Conn) {
			_, _ = io.WriteString(c, greeting+`{"id": 1, "return"`)
			_, _ = io.Copy(io.Discard, c)
		}, context.DeadlineExceeded},
		"neither": {func(c net.Conn) {
			_, _ = io.WriteString(c, greeting+`{"id": 1}`+"\n")
			_, _ = io.Copy(io.Discard, c)
		}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			start := time.Now()
			path := serve(t, tt.talk)
			_, err := Dial(ctx, path)
			if err == nil || tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("error %v, want one that wraps %v", err, tt.is)
			}
			if err != nil && (!strings.Contains(err.Error(), path) || strings.Contains(err.Error(), "\n")) {
				t.Errorf("error %q: want one line that names the socket", err)
			}
			if took := time.Since(start); took > 3*time.Second {
				t.Errorf("took %v", took)
			}
		})
	}
}

// Answers without content are no answers.
func TestEmptyAnswers(t *testing.T) {
	m := dial(t, qemu(t, func(_ string, id int) string { return fmt.Sprintf(`{"return": {}, "id": %d}`+"\n", id) }))
	if uuid, err := m.UUID(t.Context()); err == nil {
		t.Errorf("UUID %q", uuid)
	}
	m = dial(t, qemu(t, func(_ string, id int) string { return fmt.Sprintf(`{"return": {}, "id": %d}`+"\n", id) }))
	if err := m.Cont(t.Context()); err == nil {
		t.Error("a guest without a state is started")
	}
}

func TestGivenUp(t *testing.T) {
	m := dial(t, qemu(t, func(string, int) string { return "" }))
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(20*time.Millisecond, cancel)
	if _, err := m.Status(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	// The answer may come yet, and must not be taken for another's.
	if _, err := m.UUID(t.Context()); !errors.Is(err, context.Canceled) {
		t.Errorf("a connection out of step is used: %v", err)
	}
}

// A socket whose queue is full of others is one that is taken.
func TestFullQueue(t *testing.T) {
	path := filepath.Join(t.TempDir(), "monitor.sock")
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Close(fd) }()
	if err := errors.Join(syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}), syscall.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	for err == nil {
		var c net.Conn
		if c, err = net.Dial("unix", path); err == nil {
			defer func() { _ = c.Close() }()
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := Dial(ctx, path); !errors.Is(err, ErrTaken) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
}

func TestFind(t *testing.T) {
	dir := t.TempDir()
	socket := func(name string) string {
		path := filepath.Join(dir, name, "monitor.sock")
		if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		l.(*net.UnixListener).SetUnlinkOnClose(false)
		_ = l.Close()
		return path
	}
	one, twelve := socket("domain-1-web[1]"), socket("domain-12-web")
	old, current := socket("domain-3-old"), socket("domain-3-new")
	hour := time.Now().Add(-time.Hour)
	if err := os.Chtimes(old, hour, hour); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"domain-4-empty", "domain-5-file", "domain-5-file/monitor.sock"} { // no sockets
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for id, want := range map[int]string{1: one, 12: twelve, 3: current, 2: "", 4: "", 5: "", 0: "", -1: ""} {
		path, err := Find(dir, id)
		if path != want || (err == nil) != (want != "") || err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("Find(%d) = %q, %v; want %q", id, path, err, want)
		}
	}
	if _, err := Find(filepath.Join(dir, "none"), 1); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v", err)
	}
}
