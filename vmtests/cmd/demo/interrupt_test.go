package main

import (
	"bufio"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"belay/vmtests/guest"
	"belay/vmtests/lab"
)

// asDemo in the environment has the test's binary be the demo.
const asDemo = "BELAY_DEMO_TEST_RUN"

func TestMain(m *testing.M) {
	if os.Getenv(asDemo) != "" {
		os.Exit(run(os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

// A demo that is interrupted leaves nothing behind, and says so by its exit code.
func TestInterrupted(t *testing.T) {
	guest.ForTest(t) // or the test is left out
	if _, err := lab.Open(labName); err == nil {
		t.Skip("a demo is running on this machine")
	}
	tmp := t.TempDir()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Dir = filepath.Join("..", "..", "..") // as make demo
	cmd.Env = append(os.Environ(), asDemo+"=1", "TMPDIR="+tmp)
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	booting := false
	for s := bufio.NewScanner(out); s.Scan(); {
		if strings.Contains(s.Text(), "booting") {
			booting = true
			if err := cmd.Process.Signal(unix.SIGINT); err != nil {
				t.Error(err)
			}
		}
	}
	err = cmd.Wait()
	var exit *exec.ExitError
	if !booting || !errors.As(err, &exit) || exit.ExitCode() != exitInterrupted || !strings.Contains(said.String(), "nothing is left of it") {
		t.Errorf("it was booting guests: %t, and ended: %v\n%s", booting, err, said.String())
	}
	names, err := lab.List()
	if err != nil || slices.Contains(names, labName) {
		t.Errorf("labs are left: %v, %v", names, err)
	}
	left, err := os.ReadDir(tmp)
	if err != nil || len(left) > 0 {
		t.Errorf("files are left: %v, %v", left, err)
	}
}
