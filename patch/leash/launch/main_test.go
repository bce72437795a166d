package launch

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/patch/leash"
)

// This test binary is also the program that is launched ("leash FILE"), and a
// belayd that launches it ("belayd FILE"). FILE gets a line for each thing that
// a leash does.
func TestMain(m *testing.M) {
	if len(os.Args) != 3 {
		os.Exit(m.Run())
	}
	file := os.Args[2]
	switch os.Args[1] {
	case "leash":
		told := make(chan os.Signal, 1)
		signal.Notify(told, syscall.SIGTERM)
		say(file, "started "+strconv.Itoa(os.Getpid()))
		<-told
		say(file, "told")
	case "belayd":
		warnings, err := New(config(file)).Launch(context.Background(), testOp)
		fmt.Printf("launched %q %v\n", warnings, err)
		if err != nil {
			os.Exit(1)
		}
		select {}
	default:
		os.Exit(m.Run())
	}
}

const testOp = maint.OpID("hold-1")

func config(file string) Config {
	self, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return Config{Program: self, Args: func(maint.OpID) []string { return []string{"leash", file} }, Log: slog.New(slog.DiscardHandler)}
}

func say(file, what string) {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err == nil {
		_, err = fmt.Fprintln(f, what)
	}
	if err != nil {
		panic(err)
	}
}

// said waits until a file has n lines and gives them.
func said(t *testing.T, file string, n int) []string {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		b, err := os.ReadFile(file)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		if lines := strings.Split(strings.TrimSpace(string(b)), "\n"); len(b) > 0 && len(lines) >= n {
			return lines
		}
		if time.Now().After(end) {
			t.Fatalf("%d lines do not come, only %q", n, b)
		}
	}
}

// pidIn gives the process that a line "started PID" is of.
func pidIn(t *testing.T, line string) int {
	t.Helper()
	pid, err := strconv.Atoi(strings.TrimPrefix(line, "started "))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// gone waits for a process's end.
func gone(t *testing.T, pid int) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); lives(pid); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("process %d does not end", pid)
		}
	}
}

// lives reports whether a process is there and no zombie.
func lives(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(stat), ") Z ")
}

func TestProgram(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	if p, err := Program(); err == nil {
		t.Errorf("found at %s", p)
	}
	want := filepath.Join(dir, ProgramName)
	if err := os.WriteFile(want, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if p, err := Program(); err != nil || p != want {
		t.Errorf("found at %q, %v", p, err)
	}
}

var _ leash.Launcher = (*units)(nil)
