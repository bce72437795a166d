package live_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/patch/live"
	"belay/patch/live/livetest"
)

// bench is a machine, a vendor whom it trusts, and what a journal would have.
type bench struct {
	*livetest.Machine
	live.Host
	t       *testing.T
	vendor  *livetest.Vendor
	notes   *notes
	known   maint.Patches
	result  *maint.PatchResult
	guests  []maint.Guest
	libvirt error
	health  func(context.Context) error
	edit    func(file string) string
	boot    string // "": the machine's
}

func newBench(t *testing.T, o livetest.Options) *bench {
	t.Helper()
	root := t.TempDir()
	m := livetest.New(t, root, o)
	b := &bench{Machine: m, t: t, vendor: livetest.NewVendor(t), notes: &notes{data: make(map[string][]byte)},
		guests: []maint.Guest{{Name: "web-1", UUID: "u1", ID: 7, State: maint.GuestRunning}}}
	b.vendor.Trust(m.Keys)
	b.Host = live.Host{Tree: m.Tree, Kernel: m, Witness: m, Store: live.Store{Dir: filepath.Join(root, "var/lib/belay/live")}, Keys: m.Keys,
		Timing: live.Timing{Poll: time.Millisecond, Name: 30 * time.Millisecond, Limit: 20 * time.Second, Back: 20 * time.Second, Soak: 20 * time.Millisecond}}
	return b
}

func (b *bench) job(r maint.PatchRequest) *live.Job {
	if r.Boot = b.boot; r.Boot == "" {
		r.Boot = b.BootID()
	}
	return &live.Job{Host: b.Host, Request: r, Boot: r.Boot, Known: func() maint.Patches { return b.known },
		Record: func(p maint.Patches, r *maint.PatchResult) error { b.known, b.result = p, r; return nil },
		Guests: func(context.Context) ([]maint.Guest, error) { return b.guests, b.libvirt }, Health: b.health}
}

// begin writes an artifact's files and gives the job that applies them.
func (b *bench) begin(a live.Artifact) *live.Job {
	b.t.Helper()
	b.notes = &notes{data: make(map[string][]byte)}
	file := livetest.Write(b.t, b.t.TempDir(), "fix", a)
	if b.edit != nil {
		file = b.edit(file)
	}
	return b.job(maint.PatchRequest{Action: maint.PatchApply, File: file})
}

// run does the phases up to the first that fails, and undoes then.
func (b *bench) run(j *live.Job) error {
	ctx := b.t.Context()
	if err := j.Preflight(ctx, b.notes.of(live.PhasePreflight)); err != nil {
		return err
	}
	err := j.Load(ctx, b.notes.of(live.PhaseLoad))
	if err == nil {
		err = j.Soak(ctx, b.notes.of(live.PhaseSoak))
	}
	if err != nil {
		return errors.Join(err, j.Undo(ctx, b.notes.of(live.PhaseLoad)))
	}
	return j.Finish(ctx, b.notes.of(live.PhaseFinish))
}

// apply applies a cumulative livepatch, which must work.
func (b *bench) apply(name string) {
	b.t.Helper()
	if err := b.run(b.begin(b.vendor.Make(name, b.Release, b.Version, nil))); err != nil {
		b.t.Fatalf("cannot apply %s: %v", name, err)
	}
}

// force has the kernel load one that Belay knows nothing of.
func (b *bench) force(name string) {
	b.t.Helper()
	if err := b.Machine.Load(b.t.Context(), b.vendor.Make(name, b.Release, b.Version, nil)); err != nil {
		b.t.Fatal(err)
	}
}

// loadModule has a module be there that is no livepatch.
func (b *bench) loadModule(name, srcversion string) {
	b.t.Helper()
	dir := filepath.Join(b.Root(), "sys/module", name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		b.t.Fatal(err)
	}
	for file, text := range map[string]string{"srcversion": srcversion, "taint": "", "initstate": "live"} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text+"\n"), 0o644); err != nil {
			b.t.Fatal(err)
		}
	}
}

func (b *bench) write(name, text string) {
	b.t.Helper()
	if err := os.WriteFile(filepath.Join(b.Root(), name), []byte(text), 0o644); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) remove(name string) {
	b.t.Helper()
	if err := os.RemoveAll(filepath.Join(b.Root(), name)); err != nil {
		b.t.Fatal(err)
	}
}

// notes are what the phases have written down.
type notes struct {
	data  map[string][]byte
	phase string
	lines []string
}

func (n *notes) of(phase string) *notes { n.phase = phase; return n }

func (n *notes) Note(format string, args ...any) error {
	n.lines = append(n.lines, fmt.Sprintf(format, args...))
	return nil
}

func (n *notes) Save(v any) (err error) {
	n.data[n.phase], err = json.Marshal(v)
	return err
}

func (n *notes) Load(phase string, v any) (bool, error) {
	b, found := n.data[phase]
	if !found {
		return false, nil
	}
	return true, json.Unmarshal(b, v)
}

func (n *notes) text() string { return strings.Join(n.lines, "\n") }

func problem(t *testing.T, err error) *maint.Problem {
	t.Helper()
	var p *maint.Problem
	if !errors.As(err, &p) {
		t.Fatalf("%v is no problem", err)
	}
	return p
}

// refusal gives the problem of that code that a refusal has.
func refusal(t *testing.T, err error, code maint.Code) *maint.Problem {
	t.Helper()
	var r *maint.Refusal
	if !errors.As(err, &r) {
		t.Fatalf("%v is no refusal", err)
	}
	for i := range r.Problems {
		if r.Problems[i].Code == code {
			return &r.Problems[i]
		}
	}
	t.Fatalf("%v has no problem %q", err, code)
	return nil
}
