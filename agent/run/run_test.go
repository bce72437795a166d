package run

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"belay/agent/journal"
	"belay/agent/maint"
)

// mortal is a journal that dies after so many appends: the record is written,
// or not, and nothing after it. It ends the agent's life as a kill would.
type mortal struct {
	*journal.Journal
	left   int // appends until death; negative: immortal
	keep   bool
	kill   context.CancelFunc
	killed bool
}

var errDead = errors.New("killed")

func (m *mortal) Append(r ...maint.Record) error {
	if m.killed {
		return errDead
	}
	if m.left == 0 {
		m.killed = true
		m.kill()
		if m.keep {
			if err := m.Journal.Append(r...); err != nil {
				return err
			}
		}
		return errDead
	}
	m.left--
	return m.Journal.Append(r...)
}

// bench is three steps, each with an effect; the third is the commit. fail
// names the do or undo that fails.
type bench struct {
	effect map[string]bool
	trace  []string
	fail   string
	abort  context.CancelCauseFunc
	dead   func() bool
}

func (b *bench) steps() []Step {
	step := func(name string, commit bool) Step {
		act := func(what string, on bool) func(context.Context, *Scratch) error {
			return func(ctx context.Context, s *Scratch) error {
				if b.dead() {
					return errDead
				}
				if b.fail == name+":abort" && what == "do" && b.abort != nil {
					b.abort(ErrAborted)
					<-ctx.Done()
					return ctx.Err()
				}
				b.trace = append(b.trace, name+":"+what)
				if b.fail == name+":"+what {
					return maint.Problemf(maint.CodeFailed, name, "", "%s fails", what)
				}
				b.effect[name] = on
				return nil
			}
		}
		return Step{Name: name, Commit: commit, Do: act("do", true), Undo: act("undo", false)}
	}
	return []Step{step("one", false), step("two", false), step("three", true), step("four", false)}
}

func (b *bench) effects() string {
	var on []string
	for n, e := range b.effect {
		if e {
			on = append(on, n)
		}
	}
	slices.Sort(on)
	return strings.Join(on, " ")
}

// Every way an operation can go, killed at every record, before and after it
// reaches the disk: in the end the outcome and the effects are those of the
// run that nobody killed.
func TestKilledAtEveryRecord(t *testing.T) {
	for _, c := range []struct {
		fail    string
		outcome maint.Outcome
		effects string
	}{
		{"", maint.OutcomeDone, "four one three two"},
		{"one:do", maint.OutcomeFailed, ""},
		{"two:do", maint.OutcomeFailed, ""},
		{"three:do", maint.OutcomeFailed, ""},
		{"four:do", maint.OutcomePartly, "one three two"},
		{"one:abort", maint.OutcomeAborted, ""},
		{"three:abort", maint.OutcomeAborted, ""},
	} {
		t.Run("fail="+c.fail, func(t *testing.T) {
			for _, keep := range []bool{false, true} {
				for n := -1; n < 40; n++ {
					died := killedAt(t, c.fail, n, keep, c.outcome, c.effects)
					if n >= 0 && !died {
						if n < 5 {
							t.Fatalf("the operation wrote only %d records", n)
						}
						break
					}
				}
			}
		})
	}
}

func killedAt(t *testing.T, fail string, n int, keep bool, outcome maint.Outcome, effects string) (died bool) {
	t.Helper()
	j, err := journal.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer j.Close()
	accept := maint.Record{Op: "op", Kind: maint.RecAccepted, Data: encode(maint.Op{Kind: maint.OpMigrate})}
	if err := j.Append(accept); err != nil {
		t.Fatal(err)
	}
	b := &bench{effect: map[string]bool{}, fail: fail}
	for life := 0; ; life++ {
		lifeCtx, kill := context.WithCancel(context.Background())
		op, abort := context.WithCancelCause(lifeCtx)
		m := &mortal{Journal: j, left: -1, kill: kill, keep: keep}
		if life == 0 {
			m.left = n
		}
		b.dead, b.abort = func() bool { return m.killed }, abort
		got, err := Run(lifeCtx, op, m, "op", b.steps(), slog.New(slog.DiscardHandler))
		kill()
		abort(nil)
		if life == 0 {
			died = m.killed
		}
		if errors.Is(err, ErrLeftOpen) && m.killed {
			if state, _ := j.Op("op"); state.State == maint.OpEnded {
				break // the last record was written, then we died
			}
			continue
		}
		if err != nil {
			t.Fatalf("killed at record %d (kept %t), life %d: %v", n, keep, life, err)
		}
		if got != outcome {
			t.Fatalf("killed at record %d (kept %t): outcome %q, want %q\n%s", n, keep, got, outcome, strings.Join(b.trace, " "))
		}
		break
	}
	state, _ := j.Op("op")
	if state.State != maint.OpEnded || state.Outcome != outcome {
		t.Fatalf("killed at record %d (kept %t): journal says %s/%s, want %q", n, keep, state.State, state.Outcome, outcome)
	}
	if got := b.effects(); got != effects {
		t.Fatalf("killed at record %d (kept %t): effects %q, want %q\n%s", n, keep, got, effects, strings.Join(b.trace, " "))
	}
	return died
}

func newOp(t *testing.T) *journal.Journal {
	t.Helper()
	j, err := journal.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	if err := j.Append(maint.Record{Op: "op", Kind: maint.RecAccepted, Data: encode(maint.Op{})}); err != nil {
		t.Fatal(err)
	}
	return j
}

func TestStuckIsNotUndone(t *testing.T) {
	j := newOp(t)
	undone := false
	steps := []Step{
		{Name: "one", Do: func(context.Context, *Scratch) error { return nil },
			Undo: func(context.Context, *Scratch) error { undone = true; return nil }},
		{Name: "two", Do: func(context.Context, *Scratch) error {
			return &Stuck{maint.Problemf(maint.CodeUnverified, "guest g", "look", "is nowhere")}
		}},
	}
	ctx := context.Background()
	got, err := Run(ctx, ctx, j, "op", steps, slog.New(slog.DiscardHandler))
	if err != nil || got != maint.OutcomeStuck || undone {
		t.Fatalf("outcome %q, %v, undone %t", got, err, undone)
	}
}

func TestFailedUndoIsStuckAndSaysBoth(t *testing.T) {
	j := newOp(t)
	steps := []Step{{Name: "one",
		Do:   func(context.Context, *Scratch) error { return errors.New("no luck") },
		Undo: func(context.Context, *Scratch) error { return errors.New("no way back") }}}
	ctx := context.Background()
	got, err := Run(ctx, ctx, j, "op", steps, slog.New(slog.DiscardHandler))
	if err != nil || got != maint.OutcomeStuck {
		t.Fatalf("outcome %q, %v", got, err)
	}
	op, _ := j.Op("op")
	if s := fmt.Sprint(op.Problems); !strings.Contains(s, "no luck") || !strings.Contains(s, "no way back") {
		t.Fatalf("the record does not say both: %s", s)
	}
}

// After the commit neither an abort nor the deadline stops what remains.
func TestAbortAfterCommitIsTooLate(t *testing.T) {
	j := newOp(t)
	ctx, abort := context.WithCancelCause(context.Background())
	steps := []Step{
		{Name: "one", Commit: true, Do: func(context.Context, *Scratch) error { abort(ErrAborted); return nil }},
		{Name: "two", Do: func(ctx context.Context, _ *Scratch) error { return ctx.Err() }},
	}
	got, err := Run(context.Background(), ctx, j, "op", steps, slog.New(slog.DiscardHandler))
	if err != nil || got != maint.OutcomeDone {
		t.Fatalf("outcome %q, %v", got, err)
	}
}

func TestScratchSurvives(t *testing.T) {
	j := newOp(t)
	life, die := context.WithCancel(context.Background())
	do := func(_ context.Context, s *Scratch) error {
		var n int
		had, err := s.Load("one", &n)
		if err != nil || had {
			return fmt.Errorf("loaded %d, %v; want nothing", n, err)
		}
		if err := s.Save(7); err != nil {
			return err
		}
		die()
		return errDead
	}
	if _, err := Run(life, life, j, "op", []Step{{Name: "one", Do: do}}, slog.New(slog.DiscardHandler)); !errors.Is(err, ErrLeftOpen) {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	got, err := Run(ctx, ctx, j, "op", []Step{{Name: "one", Do: func(_ context.Context, s *Scratch) error {
		var n int
		if had, err := s.Load("one", &n); !had || n != 7 {
			return fmt.Errorf("loaded %d, %t, %v; want 7", n, had, err)
		}
		return nil
	}}}, slog.New(slog.DiscardHandler))
	if err != nil || got != maint.OutcomeDone {
		t.Fatalf("%q, %v", got, err)
	}
}
