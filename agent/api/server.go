package api

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"time"

	"belay/agent/maint"
)

// maxBody bounds a request's body, bytes; a guest's definition fits well. One that brings a
// plan has maxPlanBody.
const (
	maxBody     = 1 << 20
	maxPlanBody = maint.MaxPlan + maxBody
)

// writeTimeout bounds how long a caller may take to read an answer, or the
// next line of one.
const writeTimeout = 30 * time.Second

// Viewing is what a viewer may ask of an agent.
type Viewing interface {
	Status(ctx context.Context) (maint.Status, error)
	Inventory(ctx context.Context) (maint.Inventory, error)
	Doctor(ctx context.Context) ([]maint.Check, error)
}

// Operations are the operations of an agent.
type Operations interface {
	Ops(ctx context.Context) ([]maint.Op, error)
	Op(ctx context.Context, id maint.OpID) (maint.Op, error)
	Records(ctx context.Context, id maint.OpID) ([]maint.Record, error)
	// Report tells what an operation came to, or where it is.
	Report(ctx context.Context, id maint.OpID) (maint.Report, error)
	// Watch calls f with the operation now and after every change, until it
	// has ended (nil), f fails or ctx ends.
	Watch(ctx context.Context, id maint.OpID, f func(maint.Op) error) error
	Migrate(ctx context.Context, by string, r maint.MigrateRequest) (maint.Op, error)
	Hold(ctx context.Context, by string, r maint.HoldRequest) (maint.Op, error)
	Replace(ctx context.Context, by string, r maint.ReplaceRequest) (maint.Op, error)
	// Kexec starts another kernel under the guests; PlanKexec says what that would do.
	Kexec(ctx context.Context, by string, r maint.KexecRequest) (maint.Op, error)
	PlanKexec(ctx context.Context, by string, r maint.KexecRequest) (maint.KexecPlan, error)
	// ReplaceChoices says what each method of replacing a guest's QEMU would
	// cost it, and what stands in the way.
	ReplaceChoices(ctx context.Context, guest string) ([]maint.VMMChoice, error)
	// Moves says whether a guest, or with "" each, could be moved to a peer, or
	// with "" to each.
	Moves(ctx context.Context, guest, to string) ([]maint.MoveVerdict, error)
	// Abort has an operation stop and go back; AbortNow also what runs of it.
	Abort(ctx context.Context, by string, id maint.OpID) (maint.Op, error)
	AbortNow(ctx context.Context, by string, id maint.OpID) (maint.Op, error)
	// Drain has every guest moved to peers; PlanDrain says what that would do.
	Drain(ctx context.Context, by string, r maint.DrainRequest) (maint.Op, error)
	PlanDrain(ctx context.Context, r maint.DrainRequest) (maint.DrainPlan, error)
	// Restore brings back what a drain has moved.
	Restore(ctx context.Context, by string, r maint.RestoreRequest) (maint.Op, error)
	// Cordon has the host take no guests in, until Uncordon. Either may be done over.
	Cordon(ctx context.Context, by, reason string) (maint.Cordon, error)
	Uncordon(ctx context.Context, by string) error
}

// Events are the guests' scheduled events.
type Events interface {
	// Events lists them, those that are over only with all.
	Events(ctx context.Context, all bool) ([]maint.ScheduledEvent, error)
	Event(ctx context.Context, id maint.EventID) (maint.ScheduledEvent, error)
	// WatchEvents calls f with them now and after every change, until f fails or
	// ctx ends.
	WatchEvents(ctx context.Context, all bool, f func([]maint.ScheduledEvent) error) error
	ApproveEvent(ctx context.Context, by string, id maint.EventID, reason string) (maint.ScheduledEvent, error)
	CancelEvent(ctx context.Context, by string, id maint.EventID, reason string) (maint.ScheduledEvent, error)
}

// Campaigns are maintenance for which owners pick the moment.
type Campaigns interface {
	Campaigns(ctx context.Context) ([]maint.Campaign, error)
	Campaign(ctx context.Context, id maint.CampaignID) (maint.Campaign, error)
	CreateCampaign(ctx context.Context, by string, r maint.CampaignRequest) (maint.Campaign, error)
	// BookCampaign picks the moment for a guest, the zero time for now.
	BookCampaign(ctx context.Context, by string, id maint.CampaignID, guest string, at time.Time) (maint.Campaign, error)
	DeferCampaign(ctx context.Context, id maint.CampaignID, guest string) (maint.Campaign, error)
	CloseCampaign(ctx context.Context, id maint.CampaignID) (maint.Campaign, error)
}

// Patching is what is changed of the running host.
type Patching interface {
	Patches(ctx context.Context) (maint.PatchView, error)
	// Coverage says whether the running kernel is mended of a change, such as a CVE.
	Coverage(ctx context.Context, change string) (maint.Coverage, error)
	// InspectPatch judges the files of a livepatch as if it were to be loaded.
	InspectPatch(ctx context.Context, file string) (maint.PatchFile, error)
	Patch(ctx context.Context, by string, r maint.PatchRequest) (maint.Op, error)
}

// File is the body of a request about a file on the host.
type File struct {
	File string `json:"file"` // absolute path
}

// Booking is the body of a request that picks the moment for a guest.
type Booking struct {
	Guest string    `json:"guest"`       // name or UUID
	At    time.Time `json:"at,omitzero"` // none: now
}

// booking is a Booking as it comes: a moment that nobody has picked is written as
// the year 1 elsewhere, and does not mean now.
type booking struct {
	Guest string     `json:"guest"`
	At    *time.Time `json:"at"`
}

func (b booking) book(ctx context.Context, a Agent, by string, id maint.CampaignID) (any, error) {
	var at time.Time
	if b.At != nil {
		if at = *b.At; at.IsZero() {
			return nil, maint.Problemf(maint.CodeBadRequest, "at", "give a moment ahead, or none for now", "is the year 1")
		}
	}
	return a.BookCampaign(ctx, by, id, b.Guest, at)
}

// Reason is the body of a request that wants nothing but a reason.
type Reason struct {
	Reason string `json:"reason,omitempty"`
}

// Clocks are the guests' clocks.
type Clocks interface {
	// Clock measures the clock of one guest, or of all that run for "".
	Clock(ctx context.Context, guest string) ([]maint.ClockReport, error)
	// SyncClock also steps those forward that are behind.
	SyncClock(ctx context.Context, by, guest string) ([]maint.ClockReport, error)
}

// Planning is how an update would be done, and what guests allow.
type Planning interface {
	// Rungs says which rungs of the ladder can be taken with a guest, or with "" with each.
	Rungs(ctx context.Context, guest string) (maint.LadderView, error)
	// Plan says how an update would be done to this host, and changes nothing.
	Plan(ctx context.Context, r maint.PlanRequest) (maint.Plan, error)
	// Apply carries a plan out, if it is still the one that would be made.
	Apply(ctx context.Context, by string, r maint.ApplyRequest) (maint.Op, error)
	// CheckPlan refuses a plan that Apply would refuse.
	CheckPlan(ctx context.Context, p maint.Plan) error
	// ProposeUpdate makes up a manifest from the packages that are pending.
	ProposeUpdate(ctx context.Context) (maint.Proposal, error)
	Policies(ctx context.Context) ([]maint.PolicyView, error)
	Policy(ctx context.Context, guest string) (maint.PolicyView, error)
	// SetPolicy puts a policy into a guest's definition, in place of what it has there.
	SetPolicy(ctx context.Context, by, guest string, p maint.GuestPolicy) (maint.PolicyView, error)
}

// PeerSide is what one host asks of another. from is the asking host's
// certificate name.
type PeerSide interface {
	Check(ctx context.Context, from string, a maint.Arrival) ([]maint.Problem, error)
	Reserve(ctx context.Context, from string, a maint.Arrival) (maint.Landing, error)
	Release(ctx context.Context, from string, id maint.OpID) error
	View(ctx context.Context, uuid string) (maint.View, error)
	Settle(ctx context.Context, from string, s maint.Settlement) error
	CompletedJob(ctx context.Context, uuid string) (maint.Job, error)
	// Connections has those by which a guest comes in post-copy held, or ended.
	Connections(ctx context.Context, from string, id maint.OpID, c maint.Connections) error
	// Arrival waits for what is done for a guest that has come from there.
	Arrival(ctx context.Context, from string, id maint.OpID) (maint.ArrivalReport, error)
	Greeting(ctx context.Context) (Greeting, error)
	Room(ctx context.Context) (maint.PeerRoom, error)
	// Return migrates a guest back that came from there; the others are of that
	// migration.
	Return(ctx context.Context, from string, r maint.ReturnRequest) (maint.Op, error)
	WatchReturn(ctx context.Context, from string, id maint.OpID, f func(maint.Op) error) error
	AbortReturn(ctx context.Context, from string, id maint.OpID) (maint.Op, error)

	// Of disks that are copied along:
	CheckFiles(ctx context.Context, q maint.FilesQuestion) ([]maint.FileView, error)
	MakeDisks(ctx context.Context, from string, id maint.OpID) error
	RemoveDisks(ctx context.Context, from string, id maint.OpID) error
	// MoveEnd is asked of the source, by the destination.
	MoveEnd(ctx context.Context, from string, id maint.OpID) (maint.MoveEnd, error)
}

// Greeting is how one host introduces itself to another.
type Greeting struct {
	Host    maint.Host `json:"host"`
	Version string     `json:"version"`
	Now     time.Time  `json:"now"`
	// Cordoned: the host takes no guests in.
	Cordoned bool `json:"cordoned,omitempty"`
}

// Agent is everything that the API serves.
type Agent interface {
	Viewing
	Operations
	Clocks
	Events
	Campaigns
	Patching
	Planning
	PeerSide
}

// Caller is who is asking, as the connection proves it.
type Caller struct {
	Name string // "root", "uid:1000", "cert:ops-laptop"; a peer's certificate name
	Role maint.Role
}

// Identify names the caller of a request; see Unix and TLS.
type Identify func(*http.Request) Caller

var (
	viewers   = []maint.Role{maint.RoleViewer, maint.RoleOperator}
	operators = []maint.Role{maint.RoleOperator}
	peers     = []maint.Role{maint.RolePeer}
)

// Handler serves a to callers that id names.
func Handler(a Agent, id Identify, log *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	paths := make(map[string][]string)
	for _, rt := range routes(a) {
		paths[rt.path] = append(paths[rt.path], rt.method)
		mux.HandleFunc(rt.method+" "+rt.path, func(w http.ResponseWriter, r *http.Request) {
			c := id(r)
			if !slices.Contains(rt.may, c.Role) {
				fail(w, r, log, maint.Problemf(maint.CodeForbidden, "caller "+c.Name,
					"have the role given to you in belayd's configuration, section [access]: operators may change things, viewers look",
					"with role %q may not %s %s", c.Role, r.Method, r.URL.Path))
				return
			}
			answer, err := rt.do(r, c)
			if err != nil {
				fail(w, r, log, err)
				return
			}
			if s, many := answer.(stream); many {
				watch(w, r, s, log)
				return
			}
			reply(w, http.StatusOK, answer)
		})
	}
	for path, methods := range paths {
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			for _, m := range methods {
				w.Header().Add("Allow", m)
			}
			fail(w, r, log, maint.Problemf(maint.CodeMethodNotAllowed, r.URL.Path, "", "does not answer to %s", r.Method))
		})
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fail(w, r, log, maint.Problemf(maint.CodeNotFound, r.URL.Path, "see that client and belayd are of the same version", "is not part of this API"))
	})
	return mux
}

// with decodes the body strictly into a T.
func with[T any](r *http.Request, f func(T) (any, error)) (any, error) {
	return withUpTo(maxBody, r, f)
}

func withUpTo[T any](most int64, r *http.Request, f func(T) (any, error)) (any, error) {
	var v T
	body, err := io.ReadAll(io.LimitReader(r.Body, most+1))
	bad := func(format string, args ...any) error {
		return maint.Problemf(maint.CodeBadRequest, "request body", "send one JSON object as the API reference has it", format, args...)
	}
	switch {
	case err != nil:
		return nil, bad("cannot be read: %v", err)
	case int64(len(body)) > most:
		return nil, bad("is larger than %d bytes", most)
	}
	if err := decodeStrict(body, &v); err != nil {
		return nil, bad("is not valid: %v", err)
	}
	return f(v)
}

// stream is an answer of many: it gives each to tell.
type stream func(tell func(any) error) error

// watch answers with one JSON value a line, each as it comes.
func watch(w http.ResponseWriter, r *http.Request, s stream, log *slog.Logger) {
	out := http.NewResponseController(w)
	begun := false
	err := s(func(v any) error {
		if !begun {
			w.Header().Set("Content-Type", "application/x-ndjson")
			begun = true
		}
		if err := out.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil && !errors.Is(err, http.ErrNotSupported) {
			return err
		}
		if err := json.NewEncoder(w).Encode(v); err != nil {
			return err
		}
		return out.Flush()
	})
	if err != nil && !begun {
		fail(w, r, log, err)
	}
}

// failure is the JSON of an error.
type failure struct {
	Error *maint.Refusal `json:"error"`
}

func fail(w http.ResponseWriter, r *http.Request, log *slog.Logger, err error) {
	var refusal *maint.Refusal
	status := http.StatusConflict
	if !errors.As(err, &refusal) {
		p := problem(err)
		status = statusOf(p.Code)
		refusal = &maint.Refusal{Problems: []maint.Problem{*p}}
	}
	if status == http.StatusInternalServerError {
		log.Error("request failed", "method", r.Method, "path", r.URL.Path, "err", err)
	}
	reply(w, status, failure{refusal})
}

// problem gives err a code where it has none.
func problem(err error) *maint.Problem {
	code := maint.CodeInternal
	switch {
	case errors.Is(err, maint.ErrNoGuest):
		code = maint.CodeUnknownGuest
	case errors.Is(err, maint.ErrHypervisorDown):
		code = maint.CodeHypervisorDown
	case errors.Is(err, maint.ErrPeerDown):
		code = maint.CodePeerDown
	case errors.Is(err, maint.ErrNoJob):
		code = maint.CodeNoJob
	}
	return maint.AsProblem(err, code, "")
}

func statusOf(c maint.Code) int {
	switch c {
	case maint.CodeBadRequest:
		return http.StatusBadRequest
	case maint.CodeForbidden:
		return http.StatusForbidden
	case maint.CodeUnknownGuest, maint.CodeUnknownPeer, maint.CodeUnknownOp, maint.CodeNotFound, maint.CodeNoJob:
		return http.StatusNotFound
	case maint.CodeMethodNotAllowed:
		return http.StatusMethodNotAllowed
	case maint.CodeHypervisorDown, maint.CodePeerDown, maint.CodeShuttingDown:
		return http.StatusServiceUnavailable
	case maint.CodeJournal:
		return http.StatusInsufficientStorage
	case maint.CodeInternal:
		return http.StatusInternalServerError
	}
	return http.StatusConflict
}

func reply(w http.ResponseWriter, status int, v any) {
	// Without a connection, in a test, there is nothing to wait for.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(writeTimeout))
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if v == nil {
		v = struct{}{}
	}
	// A write error means that the caller has gone: nobody is left to tell.
	_ = json.NewEncoder(w).Encode(v)
}
