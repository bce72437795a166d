package plan

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"belay/agent/maint"
)

// What is assumed before anything was felt on a host. Each is spread by half and double.
const (
	assumedBlackout = 250 * time.Millisecond
	assumedOverhead = 150 * time.Millisecond // of a hold, beside its step
	assumedStep     = 5 * time.Second        // of which the manifest does not tell
	assumedReplace  = time.Second
	assumedKexec    = 90 * time.Second
)

// enough is how many of a guest's own are needed for them to be believed rather than all
// guests', and spreadFrom how many predictions to know how far they are off.
const (
	enough     = 3
	spreadFrom = 5
)

// key is what is felt alike: a rung, and of B2 a method.
type key struct {
	rung   maint.Rung
	method maint.VMMMethod
}

// past is what has been felt of one key, in order of time.
type past struct {
	all []time.Duration            // sorted
	own map[string][]time.Duration // by guest, sorted
	// ratios are of what was felt to what would have been predicted just before, sorted;
	// within is how many were between low and high.
	ratios []float64
	within int
}

// history is what predictions are made from.
type history struct {
	by map[key]*past
	// work is how long host steps have taken within holds, by what they were, sorted.
	work map[string][]time.Duration
}

// beside is what a guest felt beside the host's step, which is predicted by itself.
func beside(f maint.Felt) time.Duration {
	if f.Rung == maint.RungB1 {
		return max(0, f.Pause-f.Work)
	}
	return f.Pause
}

func newHistory(felt []maint.Felt) history {
	h := history{by: make(map[key]*past), work: make(map[string][]time.Duration)}
	felt = slices.Clone(felt)
	slices.SortStableFunc(felt, func(a, b maint.Felt) int { return a.At.Compare(b.At) })
	type run struct {
		step string
		work time.Duration
		at   time.Time
	}
	counted := make(map[run]bool) // one step of a hold, however many guests
	for _, f := range felt {
		k := key{f.Rung, f.Method}
		p := h.by[k]
		if p == nil {
			p = &past{own: make(map[string][]time.Duration)}
			h.by[k] = p
		}
		p.learn(f)
		if r := (run{f.Step, f.Work, f.At}); f.Rung == maint.RungB1 && f.Step != "" && !counted[r] {
			counted[r] = true
			h.work[f.Step] = insert(h.work[f.Step], f.Work)
		}
	}
	return h
}

// learn holds what was felt against what would have been predicted, and takes it in.
func (p *past) learn(f maint.Felt) {
	d := beside(f)
	if len(p.all) > 0 {
		e := p.predict(f.UUID, 0)
		if e.Low <= d && d <= e.High {
			p.within++
		}
		if e.Typical > 0 {
			p.ratios = insert(p.ratios, float64(d)/float64(e.Typical))
		}
	}
	p.all = insert(p.all, d)
	p.own[f.UUID] = insert(p.own[f.UUID], d)
}

func insert[T int64 | float64 | time.Duration](sorted []T, v T) []T {
	i, _ := slices.BinarySearch(sorted, v)
	return slices.Insert(sorted, i, v)
}

// quantile is the value below which there are q of the values, which are sorted.
func quantile[T int64 | float64 | time.Duration](sorted []T, q float64) T {
	return sorted[min(len(sorted)-1, int(q*float64(len(sorted))))]
}

// predict says what a guest will feel; assumed is taken where nothing has been felt yet.
// How far that may be off is what earlier predictions were off by.
func (p *past) predict(uuid string, assumed time.Duration) maint.Estimate {
	var e maint.Estimate
	switch {
	case p == nil || len(p.all) == 0:
		e = maint.Estimate{Typical: assumed, From: "assumed"}
	case len(p.own[uuid]) >= enough:
		e = maint.Estimate{Typical: quantile(p.own[uuid], 0.5), From: fmt.Sprintf("%d of this guest", len(p.own[uuid]))}
	default:
		e = maint.Estimate{Typical: quantile(p.all, 0.5), From: fmt.Sprintf("%d on this host", len(p.all))}
	}
	low, high := 0.5, 2.0
	if p != nil && len(p.ratios) >= spreadFrom {
		low, high = min(1, quantile(p.ratios, 0.05)), max(1, quantile(p.ratios, 0.95))
	}
	e.Low, e.High = scale(e.Typical, low), scale(e.Typical, high)
	return e
}

func scale(d time.Duration, by float64) time.Duration {
	return time.Duration(float64(d) * by).Round(100 * time.Microsecond)
}

// blackout is that of a move.
func (h history) blackout(uuid string) maint.Estimate {
	return h.by[key{rung: maint.RungD}].predict(uuid, assumedBlackout)
}

// standstill is that of a guest that stays, for a change delivered in a way.
func (h history) standstill(w way, ways []way, uuid string, v maint.GuestVerdict) maint.Estimate {
	switch w.rung {
	case maint.RungB1:
		e := h.by[key{rung: maint.RungB1}].predict(uuid, assumedOverhead)
		s := h.step(w.change)
		e.From = s.From
		e.Low, e.Typical, e.High = e.Low+s.Low, e.Typical+s.Typical, e.High+s.High
		return e
	case maint.RungB2:
		assumed := v.Pause
		if assumed == 0 {
			assumed = assumedReplace
		}
		return h.by[key{maint.RungB2, v.Method}].predict(uuid, assumed)
	}
	assumed := time.Duration(0)
	for _, other := range ways {
		if other.rung == maint.RungB3 && other.change.Kernel != "" {
			assumed += other.change.Standstill()
		}
	}
	if assumed == 0 {
		assumed = assumedKexec
	}
	return h.by[key{rung: maint.RungB3}].predict(uuid, assumed)
}

// step is how long a change's step keeps guests held.
func (h history) step(c maint.Change) maint.Estimate {
	if c.Apply != nil {
		if past := h.work[StepName(c.Apply.HostStep)]; len(past) > 0 {
			typical := quantile(past, 0.5)
			return maint.Estimate{Low: min(past[0], scale(typical, 0.8)), Typical: typical, High: max(past[len(past)-1], scale(typical, 1.25)),
				From: fmt.Sprintf("%d runs of the step", len(past))}
		}
	}
	if d := c.Standstill(); d > 0 {
		return maint.Estimate{Low: d / 2, Typical: d, High: 2 * d, From: "by its manifest"}
	}
	return maint.Estimate{Low: assumedStep / 2, Typical: assumedStep, High: 2 * assumedStep, From: "assumed"}
}

// StepName tells host steps apart in what has been felt.
func StepName(s maint.HostStep) string {
	if s.Unit != "" {
		job := s.Job
		if job == "" {
			job = "restart"
		}
		return job + " " + s.Unit
	}
	words := make([]string, len(s.Command))
	for i, w := range s.Command {
		words[i] = maint.ShellWord(w)
	}
	return strings.Join(words, " ")
}

// calibration is how good predictions have been, by rung and method.
func (h history) calibration() (all []maint.Calibration) {
	for k, p := range h.by {
		if n := len(p.ratios); n > 0 {
			all = append(all, maint.Calibration{Rung: k.rung, Method: k.method, Of: len(p.all) - 1, Within: p.within,
				Ratio: float64(int64(quantile(p.ratios, 0.5)*1000+0.5)) / 1000})
		}
	}
	slices.SortFunc(all, func(a, b maint.Calibration) int {
		if a.Rung != b.Rung {
			return slices.Index(maint.Rungs, a.Rung) - slices.Index(maint.Rungs, b.Rung)
		}
		if a.Method < b.Method {
			return -1
		}
		return 1
	})
	return all
}
