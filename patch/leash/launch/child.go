package launch

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"belay/agent/maint"
)

// children starts leashes as processes of their own session, which stay when
// belayd goes.
type children struct {
	Config
	mu sync.Mutex // one launch at a time, see sweep
}

func newChildren(c Config) *children { return &children{Config: c} }

// Launch implements leash.Launcher.
func (c *children) Launch(ctx context.Context, op maint.OpID) (warnings []string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	group, err := makeCgroup(op)
	if err == nil {
		defer group.Close()
		err = c.start(op, group)
	}
	if err != nil {
		if err := c.start(op, nil); err != nil {
			return nil, fmt.Errorf("cannot start %s: %w", c.Program, err)
		}
		warnings = append(warnings, fmt.Sprintf("it shares belayd's cgroup, and ends with it: %v", err))
	} else if shared := otherCgroups(); len(shared) > 0 {
		warnings = append(warnings, "it shares belayd's cgroup of version 1: "+strings.Join(shared, ", "))
	}
	return append(warnings, "without systemd nobody starts it again when it dies together with belayd"), nil
}

// start starts the process, in a cgroup if there is one. belayd reaps it for as
// long as it lives itself.
func (c *children) start(op maint.OpID, group *os.File) error {
	cmd := exec.Command(c.Program, c.Args(op)...) // whose life is no context's
	cmd.Dir = "/"
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if group != nil {
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(group.Fd())
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() {
		if err := cmd.Wait(); err != nil {
			c.Log.Error("the leash's process has ended", "op", op, "err", err)
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		sweep()
	}()
	return nil
}

// unified finds where cgroups of version 2 are mounted.
func unified() (dir string, err error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		// 36 35 98:0 /root /mount/point options - type source options
		before, after, ok := strings.Cut(lines.Text(), " - ")
		fields := strings.Fields(before)
		if ok && len(fields) > 4 && strings.HasPrefix(after, "cgroup2 ") {
			return fields[4], nil
		}
	}
	return "", errors.Join(lines.Err(), errors.New("cgroups of version 2 are not mounted"))
}

// makeCgroup makes a leash's cgroup, below the root: outside of belayd's.
func makeCgroup(op maint.OpID) (*os.File, error) {
	root, err := unified()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(root, name(op))
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	return os.Open(dir)
}

// sweep removes the cgroups of leashes that have ended: the kernel refuses it
// for the others.
func sweep() {
	root, err := unified()
	if err != nil {
		return
	}
	dirs, _ := filepath.Glob(filepath.Join(root, name("*")))
	for _, dir := range dirs {
		_ = os.Remove(dir)
	}
}

// otherCgroups are those of version 1 that this process is in, and a process it
// starts with it, other than their roots.
func otherCgroups() (shared []string) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(b)) {
		// 5:memory:/path; version 2 is 0::/path
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) == 3 && f[1] != "" && f[2] != "/" {
			shared = append(shared, f[1]+":"+f[2])
		}
	}
	return shared
}
