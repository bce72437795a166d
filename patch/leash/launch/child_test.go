package launch

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The leash of a belayd without systemd is no part of it.
func TestChild(t *testing.T) {
	file := filepath.Join(t.TempDir(), "said")
	warnings, err := newChildren(config(file)).Launch(t.Context(), testOp)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("warnings: %q", warnings)
	pid := pidIn(t, said(t, file, 1)[0])
	if sid, err := getsid(pid); sid != pid {
		t.Errorf("it is in session %d, %v", sid, err)
	}
	own := false
	if root, err := unified(); err == nil {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
		if err != nil {
			t.Fatal(err)
		}
		own = strings.Contains(string(b), "0::/belay-leash-hold-1\n")
		if _, err := os.Stat(filepath.Join(root, "belay-leash-hold-1")); (err == nil) != own {
			t.Errorf("its cgroups are\n%s", b)
		}
	}
	if all := strings.Join(warnings, "\n"); strings.Contains(all, "and ends with it") == own {
		t.Errorf("a cgroup of its own: %t, and the warnings are\n%s", own, all)
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for _, what := range []string{fmt.Sprintf("/proc/%d", pid), "/sys/fs/cgroup/belay-leash-hold-1", "/sys/fs/cgroup/unified/belay-leash-hold-1"} {
		for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
			if _, err := os.Stat(what); err != nil {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("%s stays", what)
			}
		}
	}
}

func getsid(pid int) (int, error) {
	var session int
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	_, after, _ := strings.Cut(string(stat), ") ")
	var state string
	var ppid, pgrp int
	_, err = fmt.Sscan(after, &state, &ppid, &pgrp, &session)
	return session, err
}

// belayd is killed, with all of its process group.
func TestChildOutlivesBelayd(t *testing.T) {
	file := filepath.Join(t.TempDir(), "said")
	belayd := exec.Command(os.Args[0], "belayd", file)
	belayd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := belayd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := belayd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); !strings.HasPrefix(line, "launched ") {
		t.Fatalf("%q, %v", line, err)
	}
	pid := pidIn(t, said(t, file, 1)[0])
	if err := syscall.Kill(-belayd.Process.Pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = belayd.Wait()
	time.Sleep(100 * time.Millisecond)
	if !lives(pid) {
		t.Error("it has ended with belayd")
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	said(t, file, 2)
	gone(t, pid)
	sweep()
}

func TestChildCannotBeStarted(t *testing.T) {
	c := config("")
	c.Program = "/nonexistent/belay-leash"
	if _, err := newChildren(c).Launch(t.Context(), testOp); err == nil || !strings.Contains(err.Error(), c.Program) {
		t.Errorf("%v", err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := newChildren(config("")).Launch(ended, testOp); err == nil {
		t.Error("started for a caller who had gone")
	}
	sweep()
}
