package page

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"html/template"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"golang.org/x/time/rate"

	"belay/agent/maint"
	"belay/agent/report"
)

// Agent is what the page shows.
type Agent interface {
	Status(ctx context.Context) (maint.Status, error)
	Inventory(ctx context.Context) (maint.Inventory, error)
	Doctor(ctx context.Context) ([]maint.Check, error)
	Ops(ctx context.Context) ([]maint.Op, error)
	Events(ctx context.Context, all bool) ([]maint.ScheduledEvent, error)
	Campaigns(ctx context.Context) ([]maint.Campaign, error)
	Report(ctx context.Context, id maint.OpID) (maint.Report, error)
}

const (
	// refresh is how often a browser asks again, seconds.
	refresh = 5
	// checkEvery is how old the verdicts of the ladder may be: they take asking every
	// peer, and libvirt.
	checkEvery = time.Minute
	// answerWithin bounds the making of one page. One is made at a time, and perSecond at
	// most after the first few: nobody on the host can have belayd do nothing else.
	answerWithin = 15 * time.Second
	perSecond    = 5
	// recent is how many operations that have ended are listed.
	recent = 20
)

// Handler serves the page of an agent.
func Handler(a Agent, log *slog.Logger) http.Handler {
	p := &pages{agent: a, log: log, making: make(chan struct{}, 1), pace: rate.NewLimiter(perSecond, 2*perSecond)}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", p.page(func(ctx context.Context, _ *http.Request) (any, error) { return p.host(ctx) }))
	mux.HandleFunc("GET /ops/{id}", p.page(func(ctx context.Context, r *http.Request) (any, error) {
		return p.operation(ctx, maint.OpID(r.PathValue("id")))
	}))
	mux.HandleFunc("GET /ladder", p.page(func(ctx context.Context, _ *http.Request) (any, error) { return p.rungs(ctx) }))
	mux.HandleFunc("GET /style.css", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/css; charset=utf-8")
		_, _ = w.Write(style) // nobody is left to tell
	})
	return guard(mux)
}

//go:embed style.css
var style []byte

//go:embed page.html
var source string

// pages makes pages, one at a time.
type pages struct {
	agent  Agent
	log    *slog.Logger
	making chan struct{} // has a value while one is made
	pace   *rate.Limiter

	checks  []maint.Check // as of checked
	checked time.Time
}

// page answers with the page of what find returns.
func (p *pages) page(find func(context.Context, *http.Request) (any, error)) http.HandlerFunc {
	shown := template.Must(template.New("").Funcs(words).Parse(source))
	return func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), answerWithin)
		defer cancel()
		if !p.turn(ctx) {
			http.Error(w, "belayd makes other pages; try again", http.StatusServiceUnavailable)
			return
		}
		defer func() { <-p.making }()
		status, v := http.StatusOK, any(nil)
		v, err := find(ctx, r)
		if err != nil {
			status, v = p.failed(r, err)
		}
		var b bytes.Buffer
		if err := shown.ExecuteTemplate(&b, nameOf(v), v); err != nil {
			p.log.Error("cannot make a page", "path", r.URL.Path, "err", err)
			http.Error(w, "belayd could not make this page; see its log", http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.WriteHeader(status)
		_, _ = w.Write(b.Bytes()) // nobody is left to tell
	}
}

// turn waits until a page may be made, and reports whether it may.
func (p *pages) turn(ctx context.Context) bool {
	if p.pace.Wait(ctx) != nil {
		return false
	}
	select {
	case p.making <- struct{}{}:
		return true
	case <-ctx.Done():
		return false
	}
}

// nameOf is the template of what is shown.
func nameOf(v any) string {
	switch v.(type) {
	case hostPage:
		return "host"
	case ladderPage:
		return "ladder"
	case opPage:
		return "operation"
	}
	return "problem"
}

// problemPage says why there is no page.
type problemPage struct {
	Problem maint.Problem
	Refresh int
}

func (p *pages) failed(r *http.Request, err error) (int, any) {
	problem := maint.AsProblem(err, maint.CodeInternal, "")
	if problem.Code == maint.CodeUnknownOp {
		return http.StatusNotFound, problemPage{Problem: *problem}
	}
	if !errors.Is(err, context.Canceled) {
		p.log.Warn("cannot make a page", "path", r.URL.Path, "err", err)
	}
	return http.StatusServiceUnavailable, problemPage{Problem: *problem, Refresh: refresh}
}

// hostPage is all that is shown of a host.
type hostPage struct {
	Refresh int
	Status  maint.Status
	Guests  maint.Inventory
	Events  []maint.ScheduledEvent
	// Campaigns are those that are not over.
	Campaigns []maint.Campaign
	Ended     []maint.Op // the newest first
	More      int        // how many more have ended
	Ladder    []maint.HostRung
	Checked   time.Time
}

func (p *pages) host(ctx context.Context) (v hostPage, err error) {
	v.Refresh = refresh
	if v.Status, err = p.agent.Status(ctx); err != nil {
		return v, err
	}
	if v.Guests, err = p.agent.Inventory(ctx); err != nil {
		return v, err
	}
	v.Guests.Guests = slices.Clone(v.Guests.Guests)
	slices.SortStableFunc(v.Guests.Guests, func(a, b maint.Guest) int { return strings.Compare(a.Name, b.Name) })
	if v.Events, err = p.agent.Events(ctx, false); err != nil {
		return v, err
	}
	all, err := p.agent.Campaigns(ctx)
	if err != nil {
		return v, err
	}
	for _, k := range all {
		if k.Closed.IsZero() {
			v.Campaigns = append(v.Campaigns, k)
		}
	}
	ops, err := p.agent.Ops(ctx)
	if err != nil {
		return v, err
	}
	for _, op := range slices.Backward(ops) {
		if op.State == maint.OpEnded {
			v.Ended = append(v.Ended, op)
		}
	}
	v.More = max(0, len(v.Ended)-recent)
	v.Ended = v.Ended[:len(v.Ended)-v.More]
	v.Ladder, v.Checked, err = p.ladder(ctx)
	return v, err
}

// ladderPage is every check of every rung.
type ladderPage struct {
	Host    string
	Rungs   []maint.HostRung
	Checked time.Time
}

func (p *pages) rungs(ctx context.Context) (v ladderPage, err error) {
	s, err := p.agent.Status(ctx)
	if err != nil {
		return v, err
	}
	v.Host = s.Host.Name
	v.Rungs, v.Checked, err = p.ladder(ctx)
	return v, err
}

// ladder is what doctor says, and as of when.
func (p *pages) ladder(ctx context.Context) ([]maint.HostRung, time.Time, error) {
	if p.checked.IsZero() || time.Since(p.checked) >= checkEvery {
		checks, err := p.agent.Doctor(ctx)
		if err != nil {
			return nil, p.checked, err
		}
		p.checks, p.checked = checks, time.Now()
	}
	return maint.ByRung(p.checks), p.checked, nil
}

// opPage is the report of an operation.
type opPage struct {
	Refresh int // 0: it has ended, and does not change
	Report  maint.Report
}

func (p *pages) operation(ctx context.Context, id maint.OpID) (v opPage, err error) {
	if v.Report, err = p.agent.Report(ctx, id); err != nil {
		return v, err
	}
	if v.Report.State != maint.OpEnded {
		v.Refresh = refresh
	}
	return v, nil
}

// words are how values are written. Every text goes through plain.
var words = template.FuncMap{
	"plain":   func(v any) string { return report.Plain(text(v)) },
	"span":    report.Span,
	"bytes":   report.Bytes,
	"moment":  func(t time.Time) string { return t.UTC().Format(time.DateTime) },
	"exactly": func(t time.Time) string { return t.UTC().Format(report.Moment) },
	"what":    report.What,
	"percent": percent,
	"names":   names,
	"felt":    report.Felt, "expected": report.AgainstExpected, "limit": report.Limit,
	"before": report.ClockBefore, "after": report.ClockAfter, "remarks": report.Remarks,
	"ending": report.Ending, "line": report.Line, "steptook": report.StepTook,
	"class":   class,
	"segment": func(id maint.OpID) string { return url.PathEscape(string(id)) },
	"took":    func(op maint.Op) time.Duration { return op.Ended.Sub(op.Started) },
	"since":   func(op maint.Op, now time.Time) time.Duration { return now.Sub(op.Started) },
}
