package main

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// asCommand, in the environment of this test binary, makes it the command.
const asCommand = "BELAY_TEST_AS_COMMAND"

func TestMain(m *testing.M) {
	if os.Getenv(asCommand) != "" {
		main()
	}
	os.Exit(m.Run())
}

func command(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), asCommand+"=1")
	return cmd
}

// runs runs the command, checks its exit code, and returns what it printed.
func runs(t *testing.T, wantCode int, stdin string, args ...string) (stdout, stderr string) {
	t.Helper()
	cmd := command(args...)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if code := cmd.ProcessState.ExitCode(); code != wantCode {
		t.Errorf("lab %v: exit code %d, want %d: %s", args, code, wantCode, errs.String())
	}
	return out.String(), errs.String()
}

func labName(t *testing.T) string {
	t.Helper()
	if os.Getenv("BELAY_LAB") == "skip" {
		t.Skip("BELAY_LAB=skip: tests that need a lab are left out")
	}
	name := "c" + strings.ToLower(rand.Text()[:8])
	t.Cleanup(func() { runs(t, 0, "", "down", "--name", name) })
	return name
}

func TestUsage(t *testing.T) {
	for _, args := range [][]string{
		{"nonsense"}, {"up", "more"}, {"up", "--hosts", "0"}, {"up", "--hosts", "x"}, {"up", "--name", "A-B"},
		{"down", "--all", "--name", "x"}, {"status", "-o", "xml"}, {"exec"}, {"exec", "host-a"}, {"clean", "x"},
	} {
		if _, stderr := runs(t, 2, "", args...); !strings.HasPrefix(stderr, "lab: ") {
			t.Errorf("lab %v says %q", args, stderr)
		}
	}
	if stdout, _ := runs(t, 0, "", "--help"); !strings.Contains(stdout, "exec") {
		t.Errorf("help: %q", stdout)
	}
}

func TestUpStatusExecDown(t *testing.T) {
	name := labName(t)
	_, stderr := runs(t, 1, "", "status", "--name", name)
	if !strings.Contains(stderr, "is not up") {
		t.Errorf("status of no lab: %q", stderr)
	}
	stdout, _ := runs(t, 0, "", "up", "--name", name, "--hosts", "1", "--tls")
	if !strings.HasPrefix(stdout, "host-a\t10.77.0.1\tqemu+unix://") {
		t.Errorf("up: %q", stdout)
	}
	runs(t, 1, "", "up", "--name", name)
	// A lab made by hand stays, although the process that made it is gone.
	runs(t, 0, "", "clean")

	stdout, _ = runs(t, 0, "", "status", "--name", name, "-o", "json")
	var s labStatus
	if err := json.Unmarshal([]byte(stdout), &s); err != nil {
		t.Fatal(err)
	}
	if len(s.Hosts) != 1 || len(s.Hosts[0].Daemons) != 3 || !s.TLS || s.Hosts[0].Error != "" {
		t.Errorf("status: %+v", s)
	}
	if stdout, _ = runs(t, 0, "", "status", "--name", name); !strings.Contains(stdout, "all run") {
		t.Errorf("status: %q", stdout)
	}

	stdout, _ = runs(t, 5, "typed", "exec", "--name", name, "host-a", "--", "sh", "-c", "cat; hostname; exit 5")
	if stdout != "typedhost-a\n" {
		t.Errorf("exec: %q", stdout)
	}
	runs(t, 2, "", "exec", "--name", name, "host-z", "--", "true")

	for range 2 {
		runs(t, 0, "", "down", "--name", name)
	}
	runs(t, 1, "", "status", "--name", name)
}

func TestInterruptedUpLeavesNothing(t *testing.T) {
	name := labName(t)
	for _, after := range []time.Duration{20, 100, 200} {
		cmd := command("up", "--name", name)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(after * time.Millisecond)
		if err := cmd.Process.Signal(os.Interrupt); err != nil {
			t.Fatal(err)
		}
		cmd.Wait()
		ws := cmd.ProcessState.Sys().(syscall.WaitStatus)
		if ws.Signaled() {
			// Before the command listened to signals there was nothing to clean up.
			t.Logf("ended by %v after %d ms", ws.Signal(), after)
		} else if ws.ExitStatus() == 0 {
			t.Logf("was up within %d ms", after)
			runs(t, 0, "", "down", "--name", name)
		}
		out, err := exec.Command("ip", "netns", "list").Output()
		if err != nil || strings.Contains(string(out), name) {
			t.Errorf("left behind: %s, %v", out, err)
		}
		if _, err := os.Stat("/var/lib/belay-lab/" + name); err == nil {
			t.Error("left its folder behind")
		}
	}
}
