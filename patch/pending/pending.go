// Package pending finds out which newer packages a Debian host's package manager would
// install, and who runs code of those that are there. It changes nothing.
package pending

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"belay/agent/maint"
)

// Host is where it is looked.
type Host struct {
	Root string // "" is /
	// Simulate has the package manager say what an upgrade would do; nil is apt-get's.
	Simulate func(ctx context.Context) ([]byte, error)
}

const simulateWithin = 90 * time.Second

// simulate asks apt-get, which does nothing then (-s). Packages that are new, as a kernel is,
// are part of it; none is removed.
func simulate(ctx context.Context) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, simulateWithin)
	defer cancel()
	c := exec.CommandContext(ctx, "apt-get", "-s", "-o", "Debug::NoLocking=1", "upgrade", "--with-new-pkgs")
	c.Env = append(os.Environ(), "LC_ALL=C")
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		return nil, fmt.Errorf("%w: %.300s", err, strings.TrimSpace(stderr.String()))
	}
	return out, nil
}

// Look lists what is pending. qemus are the processes of the guests.
func (h Host) Look(ctx context.Context, qemus []int) ([]maint.PendingPackage, error) {
	ask := h.Simulate
	if ask == nil {
		ask = simulate
	}
	out, err := ask(ctx)
	if err != nil {
		return nil, maint.Problemf(maint.CodeNothing, "package manager", "write the manifest yourself, from docs/examples", "cannot say what is pending (apt-get -s): %v", err)
	}
	all, err := Parse(out)
	if err != nil {
		return nil, err
	}
	users := h.users(qemus)
	for i := range all {
		p := &all[i]
		for _, file := range h.files(p.Name) {
			p.QEMU = p.QEMU || users.qemu[file]
			p.Units = append(p.Units, users.units[file]...)
			if dir, unit := filepath.Split(file); dir == "/lib/systemd/system/" && strings.HasSuffix(unit, ".service") && !strings.Contains(unit, "@.") {
				p.OwnUnits = append(p.OwnUnits, unit)
			}
		}
		slices.Sort(p.Units)
		slices.Sort(p.OwnUnits)
		p.Units, p.OwnUnits = slices.Compact(p.Units), slices.Compact(p.OwnUnits)
	}
	return all, nil
}

// line is one of apt-get's: Inst NAME [FROM] (TO ARCHIVES [ARCH]) ...
var line = regexp.MustCompile(`^Inst (\S+) (?:\[([^\]]*)\] )?\((\S+) ([^)\[]*)`)

// Parse reads what 'apt-get -s' says, sorted by name.
func Parse(out []byte) (all []maint.PendingPackage, err error) {
	s := bufio.NewScanner(bytes.NewReader(out))
	for s.Scan() {
		if !strings.HasPrefix(s.Text(), "Inst ") {
			continue
		}
		m := line.FindStringSubmatch(s.Text())
		if m == nil {
			return nil, fmt.Errorf("apt-get says %.120q, which cannot be read", s.Text())
		}
		all = append(all, maint.PendingPackage{Name: m[1], From: m[2], To: m[3], Security: strings.Contains(strings.ToLower(m[4]), "security")})
	}
	slices.SortFunc(all, func(a, b maint.PendingPackage) int { return strings.Compare(a.Name, b.Name) })
	return all, s.Err()
}

func (h Host) at(path string) string { return filepath.Join("/", h.Root, path) }

// files are those of a package that is there, without the /usr that merged systems have.
func (h Host) files(name string) (files []string) {
	found, _ := filepath.Glob(h.at("/var/lib/dpkg/info/" + name + ".list"))
	if more, _ := filepath.Glob(h.at("/var/lib/dpkg/info/" + name + ":*.list")); len(found) == 0 {
		found = more
	}
	for _, list := range found {
		b, err := os.ReadFile(list)
		if err != nil {
			continue
		}
		for f := range strings.Lines(string(b)) {
			files = append(files, plain(strings.TrimSpace(f)))
		}
	}
	return files
}

func plain(path string) string {
	rest := strings.TrimPrefix(path, "/usr")
	if strings.HasPrefix(rest, "/") {
		return rest
	}
	return path
}

// users are who has mapped files, by file.
type users struct {
	qemu  map[string]bool
	units map[string][]string
}

// users looks at every process. Of one that has ended, or may not be looked at, nothing is
// known.
func (h Host) users(qemus []int) users {
	u := users{qemu: make(map[string]bool), units: make(map[string][]string)}
	entries, _ := os.ReadDir(h.at("/proc"))
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		files := h.mapped(pid)
		unit := h.unit(pid)
		for _, f := range files {
			switch {
			case slices.Contains(qemus, pid):
				u.qemu[f] = true
			case unit != "" && !slices.Contains(u.units[f], unit):
				u.units[f] = append(u.units[f], unit)
			}
		}
	}
	return u
}

// mapped are the files that a process has mapped, each once; see proc_pid_maps(5).
func (h Host) mapped(pid int) (files []string) {
	b, err := os.ReadFile(h.at(fmt.Sprintf("/proc/%d/maps", pid)))
	if err != nil {
		return nil
	}
	seen := make(map[string]bool)
	for l := range strings.Lines(string(b)) {
		_, path, ok := strings.Cut(l, " /")
		path = plain("/" + strings.TrimSuffix(strings.TrimSpace(path), " (deleted)"))
		if ok && !seen[path] {
			seen[path] = true
			files = append(files, path)
		}
	}
	return files
}

// unit is the service that a process is of, by its cgroup; "" for none.
func (h Host) unit(pid int) string {
	b, err := os.ReadFile(h.at(fmt.Sprintf("/proc/%d/cgroup", pid)))
	if errors.Is(err, os.ErrNotExist) || err != nil {
		return ""
	}
	for l := range strings.Lines(string(b)) {
		path := l[strings.LastIndex(l, ":")+1:]
		if !strings.HasPrefix(path, "/system.slice/") {
			continue
		}
		for part := range strings.SplitSeq(strings.TrimSpace(path), "/") {
			if strings.HasSuffix(part, ".service") {
				return part
			}
		}
	}
	return ""
}
