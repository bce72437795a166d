package main

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
)

func TestKillLibvirt(t *testing.T) {
	dir := t.TempDir()
	// start starts a process of that name, for what the system knows.
	start := func(name string) *exec.Cmd {
		sleep, err := exec.LookPath("sleep")
		must(t, err)
		program := filepath.Join(dir, name)
		text, err := os.ReadFile(sleep)
		must(t, err)
		must(t, os.WriteFile(program, text, 0o755))
		cmd := exec.Command(program, "1000")
		must(t, cmd.Start())
		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
		return cmd
	}
	number := func(daemon, text string) {
		must(t, os.WriteFile(filepath.Join(dir, daemon+".pid"), []byte(text), 0o644))
	}
	killed := func(cmd *exec.Cmd) {
		t.Helper()
		_ = cmd.Wait()
		if s := cmd.ProcessState.Sys().(syscall.WaitStatus); !s.Signaled() || s.Signal() != syscall.SIGKILL {
			t.Errorf("%s has ended with %v", cmd.Path, cmd.ProcessState)
		}
	}

	if err := killLibvirt(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without any: %v", err)
	}
	other := start("other")
	for _, stale := range []string{"", "x", "-1", "0", "1", "4194305", strconv.Itoa(other.Process.Pid)} {
		number("virtqemud", stale)
		if err := killLibvirt(dir); err == nil {
			t.Errorf("killed by %q", stale)
		}
	}
	if err := other.Process.Signal(syscall.Signal(0)); err != nil {
		t.Fatalf("another process was killed: %v", err)
	}
	monolithic := start("libvirtd")
	number("libvirtd", strconv.Itoa(monolithic.Process.Pid)+"\n")
	must(t, killLibvirt(dir)) // though virtqemud's file is out of date
	killed(monolithic)

	both := start("libvirtd")
	number("libvirtd", strconv.Itoa(both.Process.Pid))
	modular := start("virtqemud")
	number("virtqemud", strconv.Itoa(modular.Process.Pid))
	must(t, killLibvirt(dir))
	killed(modular)
	if err := both.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("the daemon that has no monitors was killed too: %v", err)
	}
}
