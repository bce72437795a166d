package vmtests

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/hypervisor"
	"belay/patch/vmm/twin"
)

// twinRole is what a process of the tests in a host of the lab is told to be, in
// its environment: the twin's supervisor, or a belayd that makes a visit.
const twinRoleEnv = "BELAY_TWIN_ROLE"

type twinRole struct {
	Serve bool `json:"serve,omitempty"`

	Guest    string          `json:"guest,omitempty"`
	UUID     string          `json:"uuid,omitempty"`
	Method   maint.VMMMethod `json:"method,omitempty"`
	Phases   []string        `json:"phases,omitempty"`
	Notebook string          `json:"notebook,omitempty"` // a file
	MaxPause time.Duration   `json:"max_pause,omitempty"`
	Limit    time.Duration   `json:"limit,omitempty"`
	// Bandwidth holds live migrations back, MiB/s.
	Bandwidth uint64 `json:"bandwidth,omitempty"`
	// Halt names a place in a prewarmed crossing where the process stands
	// still until it is killed.
	Halt string `json:"halt,omitempty"`
	// CallOff calls prewarmed crossings off at the point of no return.
	CallOff bool `json:"call_off,omitempty"`
}

// twinReport is what a visit prints when it ends.
type twinReport struct {
	Problem string           `json:"problem,omitempty"`
	Stuck   bool             `json:"stuck,omitempty"`
	Refused bool             `json:"refused,omitempty"`
	Result  *maint.VMMResult `json:"result,omitempty"`
	Notes   []string         `json:"notes,omitempty"`
}

func (r twinRole) env() string {
	text, err := json.Marshal(r)
	if err != nil {
		panic(err)
	}
	return twinRoleEnv + "=" + string(text)
}

// TestTwinRole is no test but what the tests' processes in a host run.
func TestTwinRole(t *testing.T) {
	text := os.Getenv(twinRoleEnv)
	if text == "" {
		t.Skip("for processes of other tests")
	}
	var r twinRole
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	if r.Serve {
		ctx, stop := signal.NotifyContext(t.Context(), syscall.SIGTERM)
		defer stop()
		if err := twin.Serve(ctx, twin.DefaultRoot, log); err != nil {
			t.Fatal(err)
		}
		return
	}
	report := r.visit(t.Context(), log)
	out, err := json.Marshal(report)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("report %s\n", out)
}

func (r twinRole) visit(ctx context.Context, log *slog.Logger) (report twinReport) {
	fail := func(err error) twinReport {
		var refusal *maint.Refusal
		report.Problem, report.Stuck, report.Refused = err.Error(), errors.Is(err, twin.ErrStuck), errors.As(err, &refusal)
		return report
	}
	book, err := openTwinNotebook(r.Notebook)
	if err != nil {
		return fail(err)
	}
	t := &twin.Twin{
		Program:  []string{"/usr/bin/env", twinRole{Serve: true}.env(), os.Args[0], "-test.run=^TestTwinRole$", "-test.timeout=0"},
		Launcher: twin.Detached{Output: "/var/log/libvirt/twin-supervisor.log"},
	}
	home := hypervisor.New(hypervisor.Config{Log: log})
	defer home.Close()
	away := hypervisor.New(hypervisor.Config{Socket: t.Socket(), Log: log})
	defer away.Close()
	t.Libvirt = away
	v := &twin.Visit{Op: "op-1", Guest: r.Guest, UUID: r.UUID, Method: r.Method, MaxPause: r.MaxPause, Limit: r.Limit,
		Home: twinSide{home}, Away: twinSide{away}, Twin: slowTwin{t, r.Bandwidth}, Log: log,
		BeforePause: func(context.Context, bool) error { r.halt("before"); return nil },
		PointOfNoReturn: func(context.Context) error {
			r.halt("paused")
			if r.CallOff {
				return errors.New("called off by the test")
			}
			return nil
		},
	}
	for _, phase := range r.Phases {
		book.phase = phase
		fmt.Println("begins", phase)
		var err error
		switch phase {
		case twin.PhasePreflight:
			err = v.Preflight(ctx, book)
		case twin.PhaseOut:
			err = v.Out(ctx, ctx, book)
		case twin.PhaseBack:
			err = v.Back(ctx, book)
		case twin.PhaseFinish:
			var result maint.VMMResult
			result, err = v.Finish(ctx, book)
			report.Result = &result
		case "stop":
			err = t.Stop(ctx)
		}
		report.Notes = book.Notes
		if err != nil {
			return fail(fmt.Errorf("%s: %w", phase, err))
		}
		fmt.Println("ends", phase)
	}
	return report
}

// halt stands still, once the notebook says that it has not before.
func (r twinRole) halt(where string) {
	if r.Halt != where {
		return
	}
	fmt.Println("halts", where)
	select {}
}

// slowTwin holds live migrations back.
type slowTwin struct {
	*twin.Twin
	bandwidth uint64
}

func (t slowTwin) Route(uuid string, out bool) maint.MoveParams {
	p := t.Twin.Route(uuid, out)
	p.BandwidthMiBs = t.bandwidth
	return p
}

// twinSide is a host as a visit needs it.
type twinSide struct{ *hypervisor.Host }

func (s twinSide) Describe(ctx context.Context, uuid string) (twin.Description, error) {
	x, err := s.GuestXML(ctx, uuid)
	return twin.Description{Portable: x.Portable, Inactive: x.Inactive}, err
}

// twinNotebook is a Scratch in a file: what one process has saved the next finds.
type twinNotebook struct {
	path, phase string
	Notes       []string
	Saved       map[string]json.RawMessage
}

func openTwinNotebook(path string) (*twinNotebook, error) {
	n := &twinNotebook{path: path, Saved: map[string]json.RawMessage{}}
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return n, nil
	}
	if err != nil {
		return nil, err
	}
	return n, json.Unmarshal(text, n)
}

func (n *twinNotebook) write() error {
	text, err := json.Marshal(n)
	if err != nil {
		return err
	}
	if err := os.WriteFile(n.path+".new", text, 0o600); err != nil {
		return err
	}
	return os.Rename(n.path+".new", n.path)
}

func (n *twinNotebook) Note(format string, args ...any) error {
	n.Notes = append(n.Notes, fmt.Sprintf(format, args...))
	return n.write()
}

func (n *twinNotebook) Save(v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	n.Saved[n.phase] = text
	return n.write()
}

func (n *twinNotebook) Load(phase string, v any) (bool, error) {
	text, ok := n.Saved[phase]
	if !ok {
		return false, nil
	}
	return true, json.Unmarshal(text, v)
}
