package hoststep

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/patch/internal/linux"
)

// spec is what belayd tells the supervisor, and itself after a restart.
type spec struct {
	Step  maint.HostStep `json:"step"`
	Token string         `json:"token"` // marks the step's processes in their environment
	Asked time.Time      `json:"asked"`
	Wait  time.Duration  `json:"wait_ns"`  // for the word to begin
	Grace time.Duration  `json:"grace_ns"` // between SIGTERM and SIGKILL
	// Before is the unit's invocation before its job, by which a restart is
	// known to have happened.
	Before string `json:"before,omitempty"`
}

// claim says who decided whether the step begins. PID 0: it never will.
type claim struct {
	PID   int       `json:"pid,omitempty"`         // the supervisor's, or belayd's for a unit's job
	Start uint64    `json:"start_ticks,omitempty"` // since boot: with PID, names a process for good
	Time  time.Time `json:"time"`
}

// outcome is how a step went, and whether something of it could not be ended.
type outcome struct {
	maint.StepRun
	Stuck bool `json:"stuck,omitempty"`
}

// never is how a step went that never begins.
func never(why string) outcome {
	now := time.Now()
	return outcome{StepRun: maint.StepRun{Started: now, Ended: now, ExitCode: -1, Error: why}}
}

const notBegun = "the step was not begun: "

// place is the folder of one step.
type place string

func (p place) file(name string) string { return filepath.Join(string(p), name) }

func (p place) spec() (s spec, err error) {
	ok, err := readJSON(p.file("spec.json"), &s)
	if err == nil && !ok {
		err = errors.New("the step's specification is not there")
	}
	return s, err
}

func (p place) writeSpec(s spec) error { return writeJSON(p.file("spec.json"), s, os.Rename) }

// claim reports whether this claim is the first.
func (p place) claim(c claim) (bool, error) {
	err := writeJSON(p.file("claim.json"), c, os.Link)
	if errors.Is(err, fs.ErrExist) {
		return false, nil
	}
	return err == nil, err
}

func (p place) claimed() (c claim, ok bool, err error) {
	ok, err = readJSON(p.file("claim.json"), &c)
	return c, ok, err
}

// deserted says that a supervisor which could not be asked was killed before it
// was told to begin: nobody listens on its socket, which it removes otherwise.
func (p place) deserted(asked error) bool {
	_, claimed, err := p.claimed()
	return err == nil && !claimed && errors.Is(asked, unix.ECONNREFUSED)
}

func (p place) result() (r outcome, ok bool, err error) {
	ok, err = readJSON(p.file("result.json"), &r)
	return r, ok, err
}

func (p place) writeResult(r outcome) error {
	return writeJSON(p.file("result.json"), r, os.Rename)
}

// goneMark begins the names of places that are being removed.
const goneMark = ".gone-"

// remove takes the place away at once: a supervisor that comes late finds none,
// or what says that it is not to begin. It may just have made its socket there.
func (p place) remove() error {
	gone := filepath.Join(filepath.Dir(string(p)), goneMark+rand.Text())
	if err := os.Rename(string(p), gone); err != nil {
		return err
	}
	if err := os.RemoveAll(gone); err != nil {
		return os.RemoveAll(gone)
	}
	return nil
}

// writeJSON writes a file that is whole as soon as it is there: publish is
// os.Rename, or os.Link where the first one is to stay.
func writeJSON(path string, v any, publish func(from, to string) error) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // it has gone when it was renamed
	_, err = f.Write(b)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return publish(f.Name(), path)
}

func readJSON(path string, v any) (bool, error) {
	b, err := linux.ReadFile(path, maxFile)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err == nil {
		err = json.Unmarshal(b, v)
	}
	if err != nil {
		return false, fmt.Errorf("cannot read %s: %w", path, err)
	}
	return true, nil
}

// maxFile is more than any of a step's files has, bytes.
const maxFile = 4 << 20

// What a supervisor is asked.
const (
	askLook  = "look"  // answer at once
	askBegin = "begin" // begin it if it has not begun; answer when it has ended
	askEnd   = "end"   // end it, or never begin it; then answer
)

type request struct {
	Ask string `json:"ask"`
	// Env and Until are what a step begins with: at that time of CLOCK_BOOTTIME
	// its supervisor ends it by itself, and does not begin it if it hears of it
	// no earlier; 0 is never.
	Env   []string      `json:"env,omitempty"`
	Until time.Duration `json:"until_boottime_ns,omitempty"`
	// TimedOut, or Why, says why it is to end.
	TimedOut bool   `json:"timed_out,omitempty"`
	Why      string `json:"why,omitempty"`
}

// ask puts a request to the step's supervisor. An error says that none
// answered before ctx ended.
func (p place) ask(ctx context.Context, q request) (r outcome, err error) {
	err = p.viaShortPath(func(dir string) error {
		var d net.Dialer
		c, err := d.DialContext(ctx, "unix", filepath.Join(dir, "sock"))
		if err != nil {
			return err
		}
		defer c.Close()
		defer context.AfterFunc(ctx, func() { c.Close() })()
		if err := json.NewEncoder(c).Encode(q); err != nil {
			return err
		}
		return json.NewDecoder(c).Decode(&r)
	})
	return r, err
}

// listen makes the socket, which has its name only once somebody listens. drop
// takes the name away, unless it is another's.
func (p place) listen() (l *net.UnixListener, drop func(), err error) {
	fresh := fmt.Sprintf("sock-%d", os.Getpid())
	err = p.viaShortPath(func(dir string) error {
		l, err = net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, fresh), Net: "unix"})
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	l.SetUnlinkOnClose(false) // the short path is gone by then
	defer os.Remove(p.file(fresh))
	ours, err := os.Lstat(p.file(fresh))
	if err == nil {
		err = os.Link(p.file(fresh), p.file("sock"))
	}
	if err != nil {
		l.Close()
		return nil, nil, err
	}
	return l, func() {
		if now, err := os.Lstat(p.file("sock")); err == nil && os.SameFile(ours, now) {
			_ = os.Remove(p.file("sock"))
		}
	}, nil
}

// viaShortPath is for sockets, whose paths cannot be longer than 107 bytes.
func (p place) viaShortPath(do func(dir string) error) error {
	d, err := os.Open(string(p))
	if err != nil {
		return err
	}
	defer d.Close()
	return do(fmt.Sprintf("/proc/self/fd/%d", d.Fd()))
}
