package twin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/patch/internal/scratchtest"
)

// The times that a fake QEMU takes.
const (
	fakeStart = 300 * time.Millisecond
	fakeSend  = 20 * time.Millisecond
	fakeLoad  = 10 * time.Millisecond
)

// fakeQEMU is one side: at most one QEMU, as libvirt and QMP show it.
type fakeQEMU struct {
	pair   *fakePair
	name   string
	state  string // QAPI's RunState, "" without a process
	ignore bool   // x-ignore-shared
	listen string // where it waits for a guest
	sends  bool   // an outgoing migration is on its way
	files  []string
	down   bool // libvirt does not answer
	// plugged: it has a virtio-mem device.
	plugged bool
	starts  int

	// Faults, each for one time.
	noStart, dieLoading, noResume, noSend bool
}

// fakePair is a guest and the two sides it can be on.
type fakePair struct {
	t          *testing.T
	home, away *fakeQEMU
	uuid       string
	memory     string
	second     *fakeSecond
	book       *scratchtest.Notebook
	calls      int
	onCall     func(n int)
	dead       context.Context // of a belayd that was killed: its calls reach nobody once it has ended
	ran        []string        // where the guest ran, in order
	stood      time.Time
	longest    time.Duration // longest standstill
	spoilt     string        // what must not be
}

func newPair(t *testing.T) *fakePair {
	memory := filepath.Join(t.TempDir(), "pc.ram")
	if err := os.WriteFile(memory, []byte("the guest's memory"), 0o600); err != nil {
		t.Fatal(err)
	}
	p := &fakePair{t: t, uuid: "10000000-0000-4000-8000-000000000001", memory: memory, book: scratchtest.New()}
	p.second = &fakeSecond{t: t, lent: map[string][]string{}}
	p.home = &fakeQEMU{pair: p, name: "home", state: "running", files: []string{memory}}
	p.away = &fakeQEMU{pair: p, name: "away"}
	p.ran = []string{"home"}
	return p
}

func (p *fakePair) visit() *Visit {
	return &Visit{Op: "op", Guest: "web-1", UUID: p.uuid, Method: maint.VMMPrewarmed, Home: p.home, Away: p.away, Twin: p.second, Log: slog.New(slog.DiscardHandler)}
}

// set is the one place where a state changes.
func (q *fakeQEMU) set(state string) {
	p := q.pair
	other := p.home
	if q == p.home {
		other = p.away
	}
	was := q.state
	q.state = state
	switch {
	case state == "running" && other.state == "running":
		p.spoilt = "the guest runs twice"
	case state == "running" && was == "inmigrate":
		p.spoilt = "a QEMU without a guest was resumed"
	case state == "running":
		if p.ran[len(p.ran)-1] != q.name {
			p.ran = append(p.ran, q.name)
		}
		if !p.stood.IsZero() {
			p.longest = max(p.longest, time.Since(p.stood))
			p.stood = time.Time{}
		}
	case was == "running":
		p.stood = time.Now()
		if state == "" {
			p.spoilt = "a running guest was ended"
		}
	}
	if state == "" {
		q.ignore, q.listen, q.sends, q.files = false, "", false, nil
	}
}

func (q *fakeQEMU) call(ctx context.Context, op string) error {
	q.pair.calls++
	if q.pair.onCall != nil {
		q.pair.onCall(q.pair.calls)
	}
	if q.pair.dead != nil && q.pair.dead.Err() != nil {
		return errors.New("belayd is dead")
	}
	if !wait(ctx, time.Millisecond) {
		return ctx.Err()
	}
	if q.down {
		return fmt.Errorf("%s: %w", op, maint.ErrHypervisorDown)
	}
	return nil
}

func (q *fakeQEMU) Guest(ctx context.Context, _ string) (maint.Guest, error) {
	if err := q.call(ctx, "Guest"); err != nil {
		return maint.Guest{}, err
	}
	g := maint.Guest{UUID: q.pair.uuid, Name: "web-1", MemoryBytes: 128 << 20, Persistent: q.name == "home", MemorySource: "file"}
	switch q.state {
	case "":
		if q.name != "home" {
			return g, maint.ErrNoGuest
		}
		g.State = maint.GuestShutoff
	case "running":
		g.State = maint.GuestRunning
	default:
		g.State, g.Reason = maint.GuestPaused, "user"
	}
	return g, nil
}

func (q *fakeQEMU) Describe(ctx context.Context, _ string) (Description, error) {
	return Description{Portable: "<domain type='kvm'><name>web-1</name></domain>", Inactive: "<domain/>"}, q.call(ctx, "Describe")
}

func (q *fakeQEMU) DryRun(ctx context.Context, _ string, _ maint.MoveParams) error {
	return q.call(ctx, "DryRun")
}

// Migrate is the live migration that a crossing falls back on.
func (q *fakeQEMU) Migrate(ctx context.Context, _ string, _ maint.MoveParams) error {
	if err := q.call(ctx, "Migrate"); err != nil {
		return err
	}
	if q.ignore {
		q.pair.spoilt = "a migration without memory"
	}
	other := q.pair.home
	if q == other {
		other = q.pair.away
	}
	q.set("paused")
	other.files = []string{q.pair.memory}
	other.set("running")
	q.set("")
	return nil
}

func (q *fakeQEMU) AbortJob(ctx context.Context, _ string) error { return q.call(ctx, "AbortJob") }

func (q *fakeQEMU) Job(ctx context.Context, _ string) (maint.Job, error) {
	return maint.Job{}, q.call(ctx, "Job")
}

func (q *fakeQEMU) CompletedJob(ctx context.Context, _ string) (maint.Job, error) {
	return maint.Job{}, q.call(ctx, "CompletedJob")
}

func (q *fakeQEMU) CreatePaused(ctx context.Context, xml string) error {
	if err := q.call(ctx, "CreatePaused"); err != nil {
		return err
	}
	if q.noStart {
		q.noStart = false
		return errors.New("it does not start")
	}
	if q.state != "" {
		return errors.New("it is active")
	}
	files := q.pair.second.lent[fmt.Sprint(q.pair.uuid, q.name == "home")]
	if !strings.Contains(xml, "BELAY_TWIN") || len(files) == 0 {
		q.pair.spoilt = "a QEMU is started without the guest's memory"
	}
	q.starts++
	// The start goes on when the caller has gone.
	done := make(chan struct{})
	go func() {
		defer close(done)
		time.Sleep(fakeStart)
		q.files = files
		q.set("inmigrate")
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (q *fakeQEMU) Resume(ctx context.Context, _ string) error {
	if err := q.call(ctx, "Resume"); err != nil {
		return err
	}
	switch {
	case q.noResume:
		return maint.ErrLocked
	case q.state == "":
		return errors.New("it is off")
	}
	q.set("running")
	return nil
}

func (q *fakeQEMU) QuitMigrated(ctx context.Context, _ string) error {
	return q.quit(ctx, "postmigrate")
}

func (q *fakeQEMU) QuitIncoming(ctx context.Context, _ string) error { return q.quit(ctx, "inmigrate") }

func (q *fakeQEMU) quit(ctx context.Context, want string) error {
	if err := q.call(ctx, "Quit"); err != nil {
		return err
	}
	if q.state != want {
		return errors.New("it is " + q.state)
	}
	q.set("")
	return nil
}

func (q *fakeQEMU) QMP(ctx context.Context, _, command string, args any) (json.RawMessage, error) {
	if err := q.call(ctx, command); err != nil {
		return nil, err
	}
	if q.state == "" {
		return nil, errors.New("it is off")
	}
	text, err := json.Marshal(args)
	if err != nil {
		return nil, err
	}
	var a struct {
		URI          string
		Property     string
		Capabilities []struct{ State bool }
	}
	if args != nil {
		if err := json.Unmarshal(text, &a); err != nil {
			return nil, err
		}
	}
	var value any = map[string]any{}
	switch command {
	case "query-status":
		value = map[string]any{"status": q.state}
	case "query-version":
		value = map[string]any{"qemu": map[string]any{"major": 10, "minor": 0, "micro": 2}}
	case "query-migrate":
		switch {
		case q.sends:
			value = map[string]any{"status": "active"}
		case q.state == "postmigrate":
			value = map[string]any{"status": "completed", "downtime": 5}
		}
	case "query-migrate-capabilities":
		value = []any{map[string]any{"capability": capability, "state": q.ignore}}
	case "migrate-set-capabilities":
		q.ignore = a.Capabilities[0].State
	case "query-memdev":
		value = []any{map[string]any{"id": "pc.ram", "size": 128 << 20, "share": true}}
	case "query-memory-devices":
		value = []any{}
		if q.plugged {
			value = []any{map[string]any{"type": "virtio-mem"}}
		}
	case "qom-get":
		value = false
		if a.Property == "mem-path" {
			value = q.files[0]
		}
	case "migrate-incoming": // query-migrate of 7.2 does not show it
		if q.listen != "" {
			return nil, errors.New("the incoming migration has already been started")
		}
		q.listen = a.URI
	case "migrate":
		q.send(a.URI)
	case "migrate_cancel":
		q.sends = false
	default:
		q.pair.t.Errorf("a fake QEMU does not know %s", command)
	}
	return json.Marshal(value)
}

// send is an outgoing migration, which goes on by itself.
func (q *fakeQEMU) send(uri string) {
	other := q.pair.home
	if q == other {
		other = q.pair.away
	}
	q.sends = true
	before := q.state
	go func() {
		time.Sleep(fakeSend)
		if !q.sends || q.noSend {
			return
		}
		toSink := uri == "unix:/sink"
		if !toSink && (other.state != "inmigrate" || other.listen != uri) {
			q.sends = false
			return
		}
		if !toSink && (!q.ignore || !other.ignore) {
			q.pair.spoilt = "memory was copied onto itself"
		}
		if q.state != before { // paused, or resumed, by somebody else
			return
		}
		q.set("postmigrate")
		q.sends = false
		if toSink {
			return
		}
		time.Sleep(fakeLoad)
		if other.dieLoading {
			other.dieLoading = false
			other.set("")
			return
		}
		if other.state == "inmigrate" {
			other.set("paused")
		}
	}()
}

// phases does those that are not done.
func (p *fakePair) phases(v *Visit, ctx, life context.Context, done map[string]bool, undo bool) error {
	s := &site{book: p.book}
	return s.run(v, ctx, life, done, undo)
}

// isHome checks that the guest runs at home, once, and that nothing is left.
func (p *fakePair) isHome(what string) {
	p.t.Helper()
	switch {
	case p.spoilt != "":
		p.t.Errorf("%s: %s", what, p.spoilt)
	case p.home.state != "running" || p.away.state != "":
		p.t.Errorf("%s: its QEMU at home is %q, in the twin %q", what, p.home.state, p.away.state)
	case p.home.ignore:
		p.t.Errorf("%s: its QEMU leaves memory out", what)
	case len(p.second.lent) != 0 || p.second.sinks != 0:
		p.t.Errorf("%s: left: orders %v, %d sinks", what, p.second.lent, p.second.sinks)
	}
}
