package twin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"

	"belay/agent/maint"
)

// Ground is this host, as far as a visit needs it; [Twin] has it.
type Ground interface {
	// Fit tells why there cannot be two of a guest here, and what guards it
	// while it is away.
	Fit(n Need) (Guard, []maint.Problem, error)
	// Room tells why a guest's memory, as files or not, cannot be on this host
	// once more.
	Room(guest string, memory uint64, files bool) ([]maint.Problem, error)
	// Lend has the QEMU of a guest that is started next on a side, and whose
	// XML has the token, map these files; without any, none.
	Lend(uuid string, home bool, token string, files []string) error
	// Sink gives a socket whose listener discards what it is sent.
	Sink(uuid string) (path string, stop func(), err error)
}

// Need is what Fit is asked about.
type Need struct {
	Guest    string
	Portable string // XML
	Memory   uint64 // what is needed beside what the guest has, bytes
	Files    bool   // and is to be in files
	Hook     bool   // home's libvirt must have Belay's hook
}

// Fit implements Ground.
func (t *Twin) Fit(n Need) (g Guard, problems []maint.Problem, err error) {
	if findDaemon("libvirtd") == "" {
		problems = append(problems, *maint.Problemf(maint.CodeSourceRefuses, "host", "install libvirtd (it need not be enabled)",
			"has no libvirtd that could be the twin; modular daemons cannot"))
	}
	set, err := readSettings("")
	if err != nil {
		return g, nil, err
	}
	nets, err := networks("")
	if err != nil {
		return g, nil, err
	}
	fits, err := fit(n.Guest, n.Portable, nets)
	if err != nil {
		return g, nil, err
	}
	has, err := hooked(string(t.place()))
	if err != nil {
		return g, nil, err
	}
	if g, err = guard(n.Portable, set, has); err != nil {
		return g, nil, err
	}
	if n.Hook && !has {
		fits = append(fits, *maint.Problemf(maint.CodeSourceRefuses, "host", "install it as "+HookPath+" and restart libvirtd",
			"its libvirtd has not found Belay's hook, which gives a new QEMU the guest's memory"))
	}
	rooms, err := room(n.Guest, n.Memory, n.Files, set.twinMemory())
	if err != nil {
		return g, nil, err
	}
	return g, append(append(append(problems, fits...), g.problems(n.Guest)...), rooms...), nil
}

// Room implements Ground.
func (t *Twin) Room(guest string, memory uint64, files bool) ([]maint.Problem, error) {
	set, err := readSettings("")
	if err != nil {
		return nil, err
	}
	return room(guest, memory, files, set.memory())
}

// Route implements Ways. The socket is QEMU's, in a folder that no other user
// can enter: a port of the loopback would be open to all of them.
func (t *Twin) Route(uuid string, out bool) maint.MoveParams {
	p := maint.MoveParams{DestURI: t.uri(), MigrateURI: "unix://" + t.Incoming(uuid), SameHost: true}
	if !out {
		p.DestURI = t.homeURI()
	}
	return p
}

// Incoming implements Ways.
func (t *Twin) Incoming(uuid string) string { return t.place().incoming(uuid) }

// Lend implements Ground.
func (t *Twin) Lend(uuid string, home bool, token string, files []string) error {
	side := inTwin
	if home {
		side = atHome
	}
	order := t.place().order(side, uuid)
	if len(files) == 0 {
		if err := os.Remove(order); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	set, err := readSettings("")
	if err != nil {
		return err
	}
	lines := []string{token, set.homeRAMs()}
	if !home {
		lines[1] = filepath.Join(set.twinMemory(), "libvirt/qemu")
	}
	for _, f := range files {
		if strings.Contains(f, "\n") {
			return fmt.Errorf("cannot write down the name of memory file %q", f)
		}
		lines = append(lines, f)
	}
	// The hook must not find half of it.
	if err := os.WriteFile(order+".new", []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		return err
	}
	return os.Rename(order+".new", order)
}

// Sink implements Ground.
func (t *Twin) Sink(uuid string) (path string, stop func(), err error) {
	path = t.place().at("sink", uuid+".sock")
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return "", nil, err
	}
	if err := os.Chmod(path, 0o666); err != nil { // QEMU may be another user's
		l.Close()
		return "", nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			context.AfterFunc(ctx, func() { c.Close() })
			go func() { _, _ = io.Copy(io.Discard, c) }()
		}
	}()
	return path, func() { cancel(); l.Close() }, nil
}
