package hoststep

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// process is one line of /proc.
type process struct {
	pid, parent int
	start       uint64 // ticks since boot
	state       byte   // R, S, D, Z, …
	name        string
}

// ended says that a process only waits to be reaped.
func (p process) ended() bool { return p.state == 'Z' || p.state == 'X' }

func (p process) String() string { return fmt.Sprintf("%d (%s, state %c)", p.pid, p.name, p.state) }

// look reads /proc/PID/stat; false: there is no such process.
func look(pid int) (process, bool) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return process{}, false
	}
	open, shut := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')') // a name can have anything in it
	f := strings.Fields(string(b[shut+1:]))
	if open < 0 || shut < open || len(f) < 20 {
		return process{}, false
	}
	p := process{pid: pid, state: f[0][0], name: string(b[open+1 : shut])}
	p.parent, _ = strconv.Atoi(f[1])
	p.start, _ = strconv.ParseUint(f[19], 10, 64)
	return p, true
}

// is says that this very process is still there.
func (p process) is() bool {
	now, ok := look(p.pid)
	return ok && now.start == p.start
}

// signal sends to this very process, not to one that has its number since.
func (p process) signal(s unix.Signal) {
	fd, err := unix.PidfdOpen(p.pid, 0)
	if err != nil {
		return // it has gone
	}
	defer unix.Close(fd)
	if p.is() {
		_ = unix.PidfdSendSignal(fd, s, nil, 0) // what could not be ended is told by who looks again
	}
}

func processes() []process {
	d, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer d.Close()
	names, _ := d.Readdirnames(-1)
	var all []process
	for _, n := range names {
		if pid, err := strconv.Atoi(n); err == nil {
			if p, ok := look(pid); ok {
				all = append(all, p)
			}
		}
	}
	return all
}

// below gives the roots and their descendants, less those that have ended. It
// does not pass this process on the way down.
func below(all []process, roots map[int]bool) []process {
	children := make(map[int][]process)
	for _, p := range all {
		children[p.parent] = append(children[p.parent], p)
	}
	var found []process
	self, seen := os.Getpid(), make(map[int]bool)
	var visit func(p process)
	visit = func(p process) {
		if seen[p.pid] {
			return
		}
		seen[p.pid] = true
		if !p.ended() {
			found = append(found, p)
		}
		for _, c := range children[p.pid] {
			if c.pid != self {
				visit(c)
			}
		}
	}
	for _, p := range all {
		if roots[p.pid] {
			visit(p)
		}
	}
	return found
}

// descendants are all processes below one. Nothing gets away from a subreaper
// but by asking somebody else to start it.
func descendants(of int) []process {
	tree := below(processes(), map[int]bool{of: true})
	return slices.DeleteFunc(tree, func(p process) bool { return p.pid == of })
}

// marked are the processes whose environment has a step's token, and all
// below them: what can be found when their subreaper was killed. One that was
// given another environment and has lost its parents is not found.
func marked(token string) []process {
	all, roots := processes(), make(map[int]bool)
	mark := []byte(tokenVar + "=" + token)
	for _, p := range all {
		env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", p.pid))
		if err == nil && bytes.Contains(env, mark) && p.pid != os.Getpid() {
			roots[p.pid] = true
		}
	}
	return below(all, roots)
}

const (
	// killLimit bounds the wait for processes that were sent SIGKILL; one in
	// uninterruptible sleep does not end.
	killLimit = 2 * time.Second
	scanEvery = 10 * time.Millisecond
)

// endAll ends what find finds: SIGTERM, after grace SIGKILL. gone, which can
// be nil, tells that nothing is left. It returns what did not end in time.
func endAll(find func() []process, gone <-chan struct{}, grace time.Duration) []process {
	for _, p := range find() {
		p.signal(unix.SIGTERM)
		p.signal(unix.SIGCONT) // one that is stopped would not see it
	}
	scan := time.NewTicker(scanEvery)
	defer scan.Stop()
	kill, limit := time.After(grace), time.After(grace+killLimit)
	killing := false
	for {
		left := find()
		if len(left) == 0 {
			return nil
		}
		if killing {
			for _, p := range left {
				p.signal(unix.SIGKILL)
			}
		}
		select {
		case <-gone:
			return nil
		case <-kill:
			killing = true
		case <-limit:
			return find()
		case <-scan.C:
		}
	}
}

// stuck says that processes did not end.
func stuck(left []process) string {
	names := make([]string, 0, len(left))
	for _, p := range left[:min(len(left), 5)] {
		names = append(names, p.String())
	}
	return fmt.Sprintf("%d of its processes did not end although killed: %s", len(left), strings.Join(names, ", "))
}
