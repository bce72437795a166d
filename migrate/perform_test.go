package migrate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"belay/agent/maint"
	"belay/hypervisor"
	"belay/hypervisor/hypervisortest"
)

// here is a host as a Source.
type here struct{ *hypervisortest.Host }

func (h here) Describe(ctx context.Context, uuid string) (Description, error) {
	x, err := h.GuestXML(ctx, uuid)
	return Description{CPUXML: x.CPU, Inactive: x.Inactive}, err
}

func (h here) Mark(_ context.Context, files []maint.FileNeed) ([]maint.FileNeed, func()) {
	return files, func() {}
}

func (h here) CheckWay(context.Context, string, string, maint.MoveParams) []maint.Problem { return nil }

func (h here) Reaches(netip.Addr) error { return nil }

func (h here) Trusts() []string { return nil }

func (h here) Severed(ctx context.Context, uuid string) (bool, error) {
	return hypervisor.Severed(ctx, h.Host, uuid)
}

func (h here) HoldConnections(ctx context.Context, uuid string, port uint16) ([]maint.Connection, error) {
	return h.HoldOut(ctx, uuid, port, port)
}

func (h here) MoveSupport(ctx context.Context, uuid string) (maint.MoveSupport, error) {
	return hypervisor.MoveSupport(ctx, h.Host, uuid)
}

func (h here) Suspended(ctx context.Context, uuid string) (bool, error) {
	return hypervisor.SuspendedInCopy(ctx, h.Host, uuid)
}

// there is a host as a Destination. A function that is set is asked first, and
// has the answer if that is an error.
type there struct {
	host     *hypervisortest.Host
	reserve  func(context.Context) error
	settle   func(context.Context) error
	hold     func(context.Context) error
	others   func(context.Context) error // all other questions
	promises atomic.Int64
	landing  maint.Landing
	uuid     string // of the guest that comes
}

func ask(ctx context.Context, f func(context.Context) error) error {
	if f == nil {
		return nil
	}
	return f(ctx)
}

func (d *there) Check(ctx context.Context, _ maint.Arrival) ([]maint.Problem, error) {
	return nil, ask(ctx, d.others)
}

func (d *there) Reserve(ctx context.Context, _ maint.Arrival) (maint.Landing, error) {
	if err := ask(ctx, d.reserve); err != nil {
		return maint.Landing{}, err
	}
	d.promises.Store(1)
	return d.landing, nil
}

func (d *there) Release(ctx context.Context, _ maint.OpID) error {
	d.promises.Store(0)
	return ask(ctx, d.others)
}

func (d *there) View(ctx context.Context, uuid string) (maint.View, error) {
	v := maint.View{Host: d.host.Name()}
	if err := ask(ctx, d.others); err != nil {
		return v, err
	}
	g, err := d.host.Guest(ctx, uuid)
	switch {
	case errors.Is(err, maint.ErrNoGuest):
		return v, nil
	case err != nil:
		return v, err
	}
	v.Guest = &g
	return v, nil
}

func (d *there) Connections(ctx context.Context, _ maint.OpID, c maint.Connections) error {
	if err := ask(ctx, d.others); err != nil {
		return err
	}
	do := d.host.HoldIn
	if c.End {
		do = d.host.Sever
	} else if err := ask(ctx, d.hold); err != nil {
		return err
	}
	if n, err := do(ctx, d.uuid, c.All); err != nil || n > 0 || c.End {
		return err
	}
	return errors.New("no such connection")
}

func (d *there) Settle(ctx context.Context, _ maint.Settlement) error { return ask(ctx, d.settle) }

func (d *there) CompletedJob(ctx context.Context, uuid string) (maint.Job, error) {
	if err := ask(ctx, d.others); err != nil {
		return maint.Job{}, err
	}
	return d.host.CompletedJob(ctx, uuid)
}

// page is what one phase writes down; all pages are in one book.
type page struct {
	book  map[string]json.RawMessage
	notes *[]string
	phase string
}

func (p page) Note(format string, args ...any) error {
	*p.notes = append(*p.notes, fmt.Sprintf(format, args...))
	return nil
}

func (p page) Save(v any) (err error) {
	p.book[p.phase], err = json.Marshal(v)
	return err
}

func (p page) Load(phase string, v any) (bool, error) {
	data, ok := p.book[phase]
	if !ok {
		return false, nil
	}
	return true, json.Unmarshal(data, v)
}

// bench is one migration between two hosts in memory, in the bubble's time.
type bench struct {
	*Migration
	t     *testing.T
	w     *hypervisortest.World
	a     *hypervisortest.Host
	b     *there
	notes []string
	book  map[string]json.RawMessage
}

func (x *bench) page(phase string) page { return page{x.book, &x.notes, phase} }

// inBubble runs f on a migration whose preflight has passed.
func inBubble(t *testing.T, f func(t *testing.T, x *bench)) {
	t.Helper()
	inBubbleOn(t, hypervisortest.HostOptions{}, f)
}

// inBubbleOn is inBubble with hosts of that kind.
func inBubbleOn(t *testing.T, hosts hypervisortest.HostOptions, f func(t *testing.T, x *bench)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := hypervisortest.NewWorld()
		defer w.Close()
		x := &bench{w: w, a: w.AddHost("a", hosts),
			b:    &there{host: w.AddHost("b", hosts)},
			book: make(map[string]json.RawMessage)}
		uuid := x.a.PutGuest("web-1", func(g *maint.Guest) { g.Autostart, g.Reason = true, "migration canceled" })
		x.Migration = &Migration{Op: "mig-1", Guest: "web-1", UUID: uuid, From: "a", To: "b", Source: here{x.a}, Destination: x.b,
			Params: maint.MoveParams{DestURI: x.b.host.URI()}, Log: slog.New(slog.DiscardHandler), Progress: func(maint.Job) {}}
		x.b.uuid = uuid
		if err := x.Preflight(t.Context(), x.page(PhasePreflight)); err != nil {
			t.Fatal(err)
		}
		f(t, x)
	})
}

// hang is a host that takes a question and never answers.
func hang(ctx context.Context) error {
	<-ctx.Done()
	return maint.Problemf(maint.CodePeerDown, "peer b", "", "cannot be reached: %v", ctx.Err())
}

// within fails the test when f takes longer than d.
func within(t *testing.T, d time.Duration, what string, f func()) {
	t.Helper()
	begun := time.Now()
	f()
	if took := time.Since(begun); took > d {
		t.Errorf("%s took %s, more than %s", what, took, d)
	}
}

// TestPeerThatHangs: after the point of no return nothing but these phases
// themselves ends an operation, so a peer that takes a question and never
// answers must not hold them.
func TestPeerThatHangs(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, x *bench) {
		if err := x.Perform(t.Context(), t.Context(), x.page(PhasePerform)); err != nil {
			t.Fatal(err)
		}
		x.b.settle, x.b.others = hang, hang
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		within(t, 3*time.Minute, "verify", func() {
			var p *maint.Problem
			if err := x.Verify(ctx, x.page(PhaseVerify)); !errors.As(err, &p) || p.Code != maint.CodeUnverified {
				t.Errorf("verify says %v", err)
			}
		})
		within(t, time.Minute, "measuring", func() {
			if _, err := x.Measure(ctx); err == nil {
				t.Error("a peer that says nothing was measured")
			}
		})
		within(t, time.Minute, "the release", func() {
			if err := x.Release(ctx, x.page(PhaseFinish)); err != nil {
				t.Error(err)
			}
		})
	})
}

// TestPreflightOfAPeerThatHangs: the operation's own time can be a day.
func TestPreflightOfAPeerThatHangs(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, x *bench) {
		x.b.others = hang
		ctx, cancel := context.WithTimeout(t.Context(), 24*time.Hour)
		defer cancel()
		within(t, 2*time.Minute, "preflight", func() {
			var r *maint.Refusal
			if err := x.Preflight(ctx, x.page(PhasePreflight)); !errors.As(err, &r) || r.Problems[0].Code != maint.CodePeerDown {
				t.Errorf("preflight says %v", err)
			}
		})
	})
}

// TestNothingBegun: where no copy was begun, a guest that runs on the source is
// where it was, whatever happened to it on another day and whether or not the
// peer can be asked. That is a failure, and nobody's alarm.
func TestNothingBegun(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, x *bench) {
		down := func(context.Context) error { return maint.ErrPeerDown }
		x.b.reserve, x.b.others = down, down
		if err := x.Perform(t.Context(), t.Context(), x.page(PhasePerform)); !errors.Is(err, maint.ErrPeerDown) || errors.Is(err, ErrUnsettled) {
			t.Errorf("perform says %v", err)
		}
		within(t, time.Second, "the undo", func() {
			if err := x.Cancel(t.Context(), x.page(PhasePerform)); err != nil {
				t.Error(err)
			}
		})
	})
}

// TestReleaseIsLast: a renewal that is under way when the copy ends does not
// come after the release, and keep room for a guest that is not expected.
func TestReleaseIsLast(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, x *bench) {
		x.w.SetCopy(hypervisortest.Copy{Passes: 1, Step: renewEvery, Blackout: time.Second})
		begun := time.Now()
		x.b.reserve = func(context.Context) error { // the peer has taken it: nobody can take it back
			if time.Since(begun) >= renewEvery {
				time.Sleep(8 * time.Second)
			}
			return nil
		}
		if err := x.Perform(t.Context(), t.Context(), x.page(PhasePerform)); err != nil {
			t.Fatal(err)
		}
		if err := x.Release(t.Context(), x.page(PhaseFinish)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if x.b.promises.Load() != 0 {
			t.Error("room is kept after the operation has given it up")
		}
	})
}

// TestPausedByItsOwner: who pauses a guest that is on its way gets it paused
// on the other side, and the record says so.
func TestPausedByItsOwner(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, x *bench) {
		if err := x.Perform(t.Context(), t.Context(), x.page(PhasePerform)); err != nil {
			t.Fatal(err)
		}
		x.b.host.Pause(t, x.UUID)
		if err := x.Verify(t.Context(), x.page(PhaseVerify)); err != nil {
			t.Fatal(err)
		}
		if len(x.notes) != 1 || !strings.Contains(x.notes[0], "on b the guest is paused (user)") {
			t.Errorf("the record says %q", x.notes)
		}
	})
}

// The destination's belayd is going down, and says so, when the guest is to be settled: it is
// asked again when it is back.
func TestSettledAfterRestart(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, x *bench) {
		if err := x.Perform(t.Context(), t.Context(), x.page(PhasePerform)); err != nil {
			t.Fatal(err)
		}
		asked := 0
		x.b.settle = func(context.Context) error {
			if asked++; asked == 1 {
				return maint.Problemf(maint.CodeShuttingDown, "belayd on b", "try again in a moment", "is shutting down")
			}
			return nil
		}
		if err := x.Verify(t.Context(), x.page(PhaseVerify)); err != nil || asked != 2 {
			t.Errorf("asked %d times: %v", asked, err)
		}
	})
}
