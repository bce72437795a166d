package views

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"time"

	"belay/agent/maint"
	"belay/notify"
)

const ownPath = "/belay/v1/"

// own is our own form of all of it; the package's comment documents it.
func own(c *call, path string) answer {
	var ask func(*call) answer
	method := http.MethodPost
	switch strings.TrimPrefix(path, ownPath) {
	case "events":
		method, ask = http.MethodGet, ownEvents
	case "history":
		method, ask = http.MethodGet, ownHistory
	case "maintenance":
		method, ask = http.MethodGet, ownMaintenance
	case "approve":
		ask = ownApprove
	case "listeners/register":
		ask = ownRegister
	case "listeners/unregister":
		ask = ownUnregister
	case "listeners/ready":
		ask = ownReady
	case "maintenance/book":
		ask = ownBook
	case "maintenance/start":
		ask = ownStart
	case "maintenance/defer":
		ask = ownDefer
	default:
		return ownError(http.StatusNotFound, maint.CodeNotFound, "there is nothing of that name", "look for it in the documentation")
	}
	if c.r.Method != method {
		a := ownError(http.StatusMethodNotAllowed, maint.CodeMethodNotAllowed, "this is asked with "+method, "")
		a.allow = method
		return a
	}
	if why := wrongHeaders(c.r); why != "" {
		return ownError(http.StatusBadRequest, maint.CodeBadRequest, why, "")
	}
	return ask(c)
}

func ownError(status int, code maint.Code, reason, remedy string) answer {
	return object(status, maint.Problem{Code: code, Reason: reason, Remedy: remedy})
}

// Document is what /belay/v1/events answers.
type Document struct {
	Incarnation uint64  `json:"incarnation"`
	Events      []Event `json:"events"`
}

// Event is a scheduled event as one of its guests sees it.
type Event struct {
	ID          maint.EventID     `json:"id"`
	Impact      maint.Impact      `json:"impact"`
	State       maint.EventState  `json:"state"`
	Source      maint.EventSource `json:"source"`
	Guests      []string          `json:"guests"` // names
	Description string            `json:"description"`
	// Duration is how long the impact is expected to last, in seconds; 0: it is
	// not felt, -1: not known.
	Duration  float64   `json:"duration_seconds"`
	Announced time.Time `json:"announced"`
	NotBefore time.Time `json:"not_before"`
	Approved  time.Time `json:"approved,omitzero"`
	Started   time.Time `json:"started,omitzero"`
	Ended     time.Time `json:"ended,omitzero"`
	// Pause is how long this guest was measured to stand still, in seconds.
	Pause    *float64         `json:"pause_seconds,omitempty"`
	Note     string           `json:"note,omitempty"`
	Campaign maint.CampaignID `json:"campaign,omitempty"`
	// Listeners are the programs in this guest that are waited for.
	Listeners []Wait `json:"listeners,omitempty"`
}

// Wait is a program that is waited for.
type Wait struct {
	Name  string    `json:"name"`
	Until time.Time `json:"until"`
	Ready time.Time `json:"ready,omitzero"`
}

func eventOf(e *maint.ScheduledEvent, guest string) Event {
	out := Event{
		ID: e.ID, Impact: e.Impact, State: e.State, Source: e.Source, Guests: make([]string, len(e.Guests)),
		Description: e.Description, Duration: seconds(e.Duration),
		Announced: e.Announced, NotBefore: e.NotBefore, Started: e.Started, Ended: e.Ended,
		Note: e.Note, Campaign: e.Campaign,
	}
	for i := range e.Guests {
		out.Guests[i] = e.Guests[i].Name
	}
	if e.Approval != nil {
		out.Approved = e.Approval.At
	}
	if p, measured := e.Pauses[guest]; measured {
		s := p.Seconds()
		out.Pause = &s
	}
	for _, l := range e.Listeners {
		if l.Guest == guest {
			out.Listeners = append(out.Listeners, Wait{Name: l.Name, Until: l.Until, Ready: l.Ready})
		}
	}
	return out
}

func seconds(d time.Duration) float64 {
	if d == maint.DurationUnknown {
		return -1
	}
	return d.Seconds()
}

func ownEvents(c *call) answer {
	known, wait, err := c.longPoll()
	if err != nil {
		return ownError(http.StatusBadRequest, maint.CodeBadRequest, err.Error(), "")
	}
	return c.document(known, wait, func(doc notify.Document) answer {
		return numbered(doc.Incarnation, func() any {
			out := Document{Incarnation: doc.Incarnation, Events: []Event{}}
			for e := range visible(doc, c.guest) {
				out.Events = append(out.Events, eventOf(e, c.guest))
			}
			return out
		})
	})
}

func ownHistory(c *call) answer {
	out := []Event{}
	past := c.source.History(c.guest)
	for i := range past {
		if concerns(&past[i], c.guest) {
			out = append(out, eventOf(&past[i], c.guest))
		}
	}
	return object(http.StatusOK, out).tag()
}

// Maintenance is a campaign as one of its guests sees it.
type Maintenance struct {
	ID          maint.CampaignID    `json:"id"`
	Description string              `json:"description"`
	Impact      maint.Impact        `json:"impact"`
	Duration    float64             `json:"duration_seconds"` // -1: not known
	Opens       time.Time           `json:"opens"`
	Deadline    time.Time           `json:"deadline"`
	State       maint.CampaignState `json:"state"`
	At          time.Time           `json:"at"` // when it will be done
	Defers      int                 `json:"defers"`
	MaxDefers   int                 `json:"max_defers"`
}

func ownMaintenance(c *call) answer {
	out := []Maintenance{}
	for _, m := range c.source.Maintenance(c.guest) {
		if g, in := m.Guests[c.guest]; in {
			out = append(out, Maintenance{
				ID: m.ID, Description: m.Description, Impact: m.Impact, Duration: seconds(m.Duration),
				Opens: m.Opens, Deadline: m.Deadline, State: g.State, At: g.At, Defers: g.Defers, MaxDefers: m.MaxDefers,
			})
		}
	}
	return object(http.StatusOK, out).tag()
}

func ownApprove(c *call) answer {
	var b struct {
		Event maint.EventID `json:"event"`
	}
	return c.do(&b, func() error {
		if b.Event == "" {
			return missing("event", "the id of one in /belay/v1/events")
		}
		return c.source.Approve(c.r.Context(), c.guest, b.Event)
	})
}

func ownRegister(c *call) answer {
	var b struct {
		Name    string `json:"name"`
		Timeout string `json:"timeout"`
	}
	return c.do(&b, func() error {
		if err := listenerName(b.Name); err != nil {
			return err
		}
		d, err := time.ParseDuration(b.Timeout)
		if err != nil || d <= 0 {
			return missing("timeout", "how long to wait for the program, such as 30s")
		}
		return c.source.Listen(c.r.Context(), c.guest, maint.Listener{Name: b.Name, Timeout: d})
	})
}

func ownUnregister(c *call) answer {
	var b struct {
		Name string `json:"name"`
	}
	return c.do(&b, func() error {
		if err := listenerName(b.Name); err != nil {
			return err
		}
		return c.source.Unlisten(c.r.Context(), c.guest, b.Name)
	})
}

func ownReady(c *call) answer {
	var b struct {
		Name  string        `json:"name"`
		Event maint.EventID `json:"event"`
	}
	return c.do(&b, func() error {
		if err := listenerName(b.Name); err != nil {
			return err
		}
		if b.Event == "" {
			return missing("event", "the id of one in /belay/v1/events")
		}
		return c.source.Ready(c.r.Context(), c.guest, b.Name, b.Event)
	})
}

func ownBook(c *call) answer {
	var b struct {
		Campaign maint.CampaignID `json:"campaign"`
		At       time.Time        `json:"at"`
	}
	return c.do(&b, func() error {
		switch {
		case b.Campaign == "":
			return missing("campaign", "the id of one in /belay/v1/maintenance")
		case b.At.IsZero():
			return missing("at", "a time such as 2026-11-22T02:00:00Z")
		}
		return c.source.Book(c.r.Context(), c.guest, b.Campaign, b.At)
	})
}

func ownStart(c *call) answer {
	return c.doCampaign(func(id maint.CampaignID) error {
		return c.source.Book(c.r.Context(), c.guest, id, time.Time{})
	})
}

func ownDefer(c *call) answer {
	return c.doCampaign(func(id maint.CampaignID) error {
		return c.source.Defer(c.r.Context(), c.guest, id)
	})
}

func (c *call) doCampaign(do func(maint.CampaignID) error) answer {
	var b struct {
		Campaign maint.CampaignID `json:"campaign"`
	}
	return c.do(&b, func() error {
		if b.Campaign == "" {
			return missing("campaign", "the id of one in /belay/v1/maintenance")
		}
		return do(b.Campaign)
	})
}

// do reads a body and does what it says.
func (c *call) do(body any, do func() error) answer {
	d := json.NewDecoder(http.MaxBytesReader(nil, c.r.Body, maxBody))
	d.DisallowUnknownFields()
	err := d.Decode(body)
	if err == nil {
		if _, more := d.Token(); !errors.Is(more, io.EOF) {
			err = errors.New("something follows it")
		}
	}
	if err != nil {
		err = maint.Problemf(maint.CodeBadRequest, "", "send one JSON object with the fields that are documented", "the body cannot be read: %v", err)
	} else {
		err = do()
	}
	if err != nil {
		p, status := c.problem(err)
		return object(status, p)
	}
	return answer{status: http.StatusNoContent}
}

func missing(field, remedy string) error {
	return maint.Problemf(maint.CodeBadRequest, field, "give "+remedy, "is missing or cannot be read")
}

// listenerName bounds what goes into logs and the domain's metadata.
func listenerName(name string) error {
	for _, r := range name {
		if !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("._-", r)) {
			name = ""
		}
	}
	if name == "" || len(name) > 64 {
		return missing("name", "1 to 64 letters, digits, dots, dashes and underscores")
	}
	return nil
}

// problem is what a guest is told of an error, and the status. Problems and
// Refusals are meant for it; of other errors, which may name anything of the
// host, it learns nothing, and the log has them.
func (c *call) problem(err error) (*maint.Problem, int) {
	if errors.Is(err, maint.ErrUnknownEvent) {
		return maint.Problemf(maint.CodeNotFound, "event", "give the id of one that is announced", "there is no such event"), http.StatusNotFound
	}
	var p *maint.Problem
	var r *maint.Refusal
	switch {
	case errors.As(err, &p):
	case errors.As(err, &r) && len(r.Problems) > 0:
		p = &maint.Problem{Code: r.Problems[0].Code, Reason: r.Error()}
	default:
		if c.r.Context().Err() == nil { // else it has gone away
			c.log.Error("cannot do what a guest asked for", "guest", c.guest, "path", c.r.URL.Path, "err", err)
		}
		return maint.Problemf(maint.CodeInternal, "", "try again later", "the host could not do it"), http.StatusInternalServerError
	}
	switch p.Code {
	case maint.CodeBadRequest:
		return p, http.StatusBadRequest
	case maint.CodeForbidden:
		return p, http.StatusForbidden
	case maint.CodeNotFound:
		return p, http.StatusNotFound
	case maint.CodeShuttingDown:
		return p, http.StatusServiceUnavailable
	}
	return p, http.StatusConflict
}
