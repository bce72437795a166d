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

// handler answers one call. What it returns is the JSON of the answer.
type handler func(*http.Request, Caller) (any, error)

type route struct {
	method, path string
	may          []maint.Role
	do           handler
}

func routes(a Agent) []route {
	return []route{
		{"GET", "/v1/status", viewers, func(r *http.Request, _ Caller) (any, error) { return a.Status(r.Context()) }},
		{"GET", "/v1/guests", viewers, func(r *http.Request, _ Caller) (any, error) { return a.Inventory(r.Context()) }},
		{"GET", "/v1/doctor", viewers, func(r *http.Request, _ Caller) (any, error) { return a.Doctor(r.Context()) }},
		{"GET", "/v1/ops", viewers, func(r *http.Request, _ Caller) (any, error) {
			ops, err := a.Ops(r.Context())
			for i := range ops {
				ops[i] = brief(ops[i])
			}
			return ops, err
		}},
		{"GET", "/v1/ops/{id}", viewers, func(r *http.Request, _ Caller) (any, error) { return a.Op(r.Context(), opID(r)) }},
		{"GET", "/v1/ops/{id}/records", viewers, func(r *http.Request, c Caller) (any, error) { return records(r.Context(), a, opID(r), c) }},
		{"GET", "/v1/ops/{id}/report", viewers, func(r *http.Request, _ Caller) (any, error) { return a.Report(r.Context(), opID(r)) }},
		{"GET", "/v1/ops/{id}/watch", viewers, func(r *http.Request, _ Caller) (any, error) {
			return stream(func(tell func(any) error) error {
				return a.Watch(r.Context(), opID(r), func(op maint.Op) error { return tell(brief(op)) })
			}), nil
		}},
		{"POST", "/v1/migrations", operators, func(r *http.Request, c Caller) (any, error) {
			return with(r, func(q maint.MigrateRequest) (any, error) { return a.Migrate(r.Context(), c.Name, q) })
		}},
		{"POST", "/v1/holds", operators, func(r *http.Request, c Caller) (any, error) {
			return with(r, func(q maint.HoldRequest) (any, error) { return a.Hold(r.Context(), c.Name, q) })
		}},
		{"POST", "/v1/replacements", operators, func(r *http.Request, c Caller) (any, error) {
			return with(r, func(q maint.ReplaceRequest) (any, error) { return a.Replace(r.Context(), c.Name, q) })
		}},
		{"GET", "/v1/guests/{guest}/replacements", operators, func(r *http.Request, _ Caller) (any, error) {
			return a.ReplaceChoices(r.Context(), r.PathValue("guest"))
		}},
		{"POST", "/v1/kexecs", operators, func(r *http.Request, c Caller) (any, error) {
			return with(r, func(q maint.KexecRequest) (any, error) { return a.Kexec(r.Context(), c.Name, q) })
		}},
		{"POST", "/v1/kexecs/plan", operators, func(r *http.Request, c Caller) (any, error) {
			return with(r, func(q maint.KexecRequest) (any, error) { return a.PlanKexec(r.Context(), c.Name, q) })
		}},
		{"POST", "/v1/drains", operators, func(r *http.Request, c Caller) (any, error) {
			return with(r, func(q maint.DrainRequest) (any, error) { return a.Drain(r.Context(), c.Name, q) })
		}},
		{"POST", "/v1/drains/plan", operators, func(r *http.Request, _ Caller) (any, error) {
			return with(r, func(q maint.DrainRequest) (any, error) { return a.PlanDrain(r.Context(), q) })
		}},
		{"POST", "/v1/restores", operators, func(r *http.Request, c Caller) (any, error) {
			return with(r, func(q maint.RestoreRequest) (any, error) { return a.Restore(r.Context(), c.Name, q) })
		}},
		{"GET", "/v1/moves", operators, func(r *http.Request, _ Caller) (any, error) {
			return a.Moves(r.Context(), r.URL.Query().Get("guest"), r.URL.Query().Get("to"))
		}},
		{"GET", "/v1/ladder", operators, func(r *http.Request, _ Caller) (any, error) {
			return a.Rungs(r.Context(), r.URL.Query().Get("guest"))
		}},
		{"GET", "/v1/events", viewers, func(r *http.Request, _ Caller) (any, error) { return events(r, a) }},
		{"GET", "/v1/events/{id}", viewers, func(r *http.Request, _ Caller) (any, error) { return a.Event(r.Context(), eventID(r)) }},
		{"POST", "/v1/events/{id}/approve", operators, func(r *http.Request, c Caller) (any, error) {
			return with(r, func(q Reason) (any, error) { return a.ApproveEvent(r.Context(), c.Name, eventID(r), q.Reason) })
		}},
		{"POST", "/v1/events/{id}/cancel", operators, func(r *http.Request, c Caller) (any, error) {
			return with(r, func(q Reason) (any, error) { return a.CancelEvent(r.Context(), c.Name, eventID(r), q.Reason) })
		}},
		{"GET", "/v1/campaigns", viewers, func(r *http.Request, _ Caller) (any, error) { return a.Campaigns(r.Context()) }},
		{"POST", "/v1/campaigns", operators, func(r *http.Request, c Caller) (any, error) {
			return with(r, func(q maint.CampaignRequest) (any, error) { return a.CreateCampaign(r.Context(), c.Name, q) })
		}},
		{"GET", "/v1/campaigns/{id}", viewers, func(r *http.Request, _ Caller) (any, error) { return a.Campaign(r.Context(), campaignID(r)) }},
		{"POST", "/v1/campaigns/{id}/book", operators, func(r *http.Request, c Caller) (any, error) {
			return with(r, func(q booking) (any, error) { return q.book(r.Context(), a, c.Name, campaignID(r)) })
		}},
		{"POST", "/v1/campaigns/{id}/defer", operators, func(r *http.Request, _ Caller) (any, error) {
			return with(r, func(q Booking) (any, error) { return a.DeferCampaign(r.Context(), campaignID(r), q.Guest) })
		}},
		{"POST", "/v1/campaigns/{id}/close", operators, func(r *http.Request, _ Caller) (any, error) { return a.CloseCampaign(r.Context(), campaignID(r)) }},
		{"GET", "/v1/patches", viewers, func(r *http.Request, _ Caller) (any, error) { return a.Patches(r.Context()) }},
		{"POST", "/v1/patches", operators, func(r *http.Request, c Caller) (any, error) {
			return with(r, func(q maint.PatchRequest) (any, error) { return a.Patch(r.Context(), c.Name, q) })
		}},
		{"POST", "/v1/patches/inspect", operators, func(r *http.Request, _ Caller) (any, error) {
			return with(r, func(q File) (any, error) { return a.InspectPatch(r.Context(), q.File) })
		}},
		{"GET", "/v1/patches/coverage", viewers, func(r *http.Request, _ Caller) (any, error) {
			return a.Coverage(r.Context(), r.URL.Query().Get("change"))
		}},
		{"POST", "/v1/plans", operators, func(r *http.Request, _ Caller) (any, error) {
			return with(r, func(q maint.PlanRequest) (any, error) { return a.Plan(r.Context(), q) })
		}},
		{"GET", "/v1/updates/pending", operators, func(r *http.Request, _ Caller) (any, error) { return a.ProposeUpdate(r.Context()) }},
		{"GET", "/v1/policies", viewers, func(r *http.Request, _ Caller) (any, error) { return a.Policies(r.Context()) }},
		{"GET", "/v1/guests/{guest}/policy", viewers, func(r *http.Request, _ Caller) (any, error) { return a.Policy(r.Context(), r.PathValue("guest")) }},
		{"PUT", "/v1/guests/{guest}/policy", operators, func(r *http.Request, c Caller) (any, error) {
			return with(r, func(q maint.GuestPolicy) (any, error) {
				return a.SetPolicy(r.Context(), c.Name, r.PathValue("guest"), q)
			})
		}},
		{"POST", "/v1/applies", operators, func(r *http.Request, c Caller) (any, error) {
			return withUpTo(maxPlanBody, r, func(q maint.ApplyRequest) (any, error) { return a.Apply(r.Context(), c.Name, q) })
		}},
		{"POST", "/v1/applies/check", operators, func(r *http.Request, _ Caller) (any, error) {
			return withUpTo(maxPlanBody, r, func(q maint.ApplyRequest) (any, error) { return nil, a.CheckPlan(r.Context(), q.Plan) })
		}},
		{"PUT", "/v1/cordon", operators, func(r *http.Request, c Caller) (any, error) {
			return with(r, func(q Reason) (any, error) { return a.Cordon(r.Context(), c.Name, q.Reason) })
		}},
		{"DELETE", "/v1/cordon", operators, func(r *http.Request, c Caller) (any, error) { return nil, a.Uncordon(r.Context(), c.Name) }},
		{"GET", "/v1/clocks", viewers, func(r *http.Request, _ Caller) (any, error) {
			return a.Clock(r.Context(), r.URL.Query().Get("guest"))
		}},
		{"POST", "/v1/clocks", operators, func(r *http.Request, c Caller) (any, error) {
			return a.SyncClock(r.Context(), c.Name, r.URL.Query().Get("guest"))
		}},
		{"POST", "/v1/ops/{id}/abort", operators, func(r *http.Request, c Caller) (any, error) {
			if r.URL.Query().Get("now") == "1" {
				return a.AbortNow(r.Context(), c.Name, opID(r))
			}
			return a.Abort(r.Context(), c.Name, opID(r))
		}},

		{"GET", "/v1/peer/greeting", peers, func(r *http.Request, _ Caller) (any, error) { return a.Greeting(r.Context()) }},
		{"POST", "/v1/peer/checks", peers, func(r *http.Request, c Caller) (any, error) {
			return with(r, func(q maint.Arrival) (any, error) { return a.Check(r.Context(), c.Name, q) })
		}},
		{"PUT", "/v1/peer/reservations/{id}", peers, func(r *http.Request, c Caller) (any, error) {
			return with(r, func(q maint.Arrival) (any, error) {
				if q.Op != opID(r) {
					return nil, maint.Problemf(maint.CodeBadRequest, "reservation "+string(opID(r)), "send the operation's own ID", "the body is of operation %q", q.Op)
				}
				return a.Reserve(r.Context(), c.Name, q)
			})
		}},
		{"DELETE", "/v1/peer/reservations/{id}", peers, func(r *http.Request, c Caller) (any, error) { return nil, a.Release(r.Context(), c.Name, opID(r)) }},
		{"PUT", "/v1/peer/reservations/{id}/connections", peers, func(r *http.Request, c Caller) (any, error) {
			return with(r, func(q maint.Connections) (any, error) { return nil, a.Connections(r.Context(), c.Name, opID(r), q) })
		}},
		{"POST", "/v1/peer/files", peers, func(r *http.Request, _ Caller) (any, error) {
			return with(r, func(q maint.FilesQuestion) (any, error) { return a.CheckFiles(r.Context(), q) })
		}},
		{"PUT", "/v1/peer/disks/{id}", peers, func(r *http.Request, c Caller) (any, error) { return nil, a.MakeDisks(r.Context(), c.Name, opID(r)) }},
		{"DELETE", "/v1/peer/disks/{id}", peers, func(r *http.Request, c Caller) (any, error) { return nil, a.RemoveDisks(r.Context(), c.Name, opID(r)) }},
		{"GET", "/v1/peer/moves/{id}", peers, func(r *http.Request, c Caller) (any, error) { return a.MoveEnd(r.Context(), c.Name, opID(r)) }},
		{"GET", "/v1/peer/guests/{uuid}", peers, func(r *http.Request, _ Caller) (any, error) { return a.View(r.Context(), r.PathValue("uuid")) }},
		{"GET", "/v1/peer/guests/{uuid}/job", peers, func(r *http.Request, _ Caller) (any, error) { return a.CompletedJob(r.Context(), r.PathValue("uuid")) }},
		{"GET", "/v1/peer/arrivals/{id}", peers, func(r *http.Request, c Caller) (any, error) { return a.Arrival(r.Context(), c.Name, opID(r)) }},
		{"GET", "/v1/peer/room", peers, func(r *http.Request, _ Caller) (any, error) { return a.Room(r.Context()) }},
		{"POST", "/v1/peer/returns", peers, func(r *http.Request, c Caller) (any, error) {
			return with(r, func(q maint.ReturnRequest) (any, error) { return a.Return(r.Context(), c.Name, q) })
		}},
		{"GET", "/v1/peer/returns/{id}/watch", peers, func(r *http.Request, c Caller) (any, error) {
			return stream(func(tell func(any) error) error {
				return a.WatchReturn(r.Context(), c.Name, opID(r), func(op maint.Op) error { return tell(op) })
			}), nil
		}},
		{"POST", "/v1/peer/returns/{id}/abort", peers, func(r *http.Request, c Caller) (any, error) { return a.AbortReturn(r.Context(), c.Name, opID(r)) }},
		{"POST", "/v1/peer/settlements", peers, func(r *http.Request, c Caller) (any, error) {
			return with(r, func(q maint.Settlement) (any, error) { return nil, a.Settle(r.Context(), c.Name, q) })
		}},
	}
}

// brief is an operation as it is among many: without what is large, and never changes.
func brief(op maint.Op) maint.Op {
	if op.Apply != nil {
		r := *op.Apply
		r.Plan = r.Plan.Brief()
		op.Apply = &r
	}
	return op
}

// records hides from mere viewers what steps wrote down for themselves: a
// guest's definition can hold secrets.
func records(ctx context.Context, a Agent, id maint.OpID, c Caller) ([]maint.Record, error) {
	recs, err := a.Records(ctx, id)
	for i := range recs {
		if c.Role != maint.RoleOperator && recs[i].Kind == maint.RecStepNote {
			recs[i].Data = nil
		}
	}
	return recs, err
}

// events lists scheduled events, with watch=1 now and after every change, and with
// all=1 also those that are over.
func events(r *http.Request, a Agent) (any, error) {
	q := r.URL.Query()
	all := q.Get("all") == "1"
	if q.Get("watch") != "1" {
		return a.Events(r.Context(), all)
	}
	return stream(func(tell func(any) error) error {
		return a.WatchEvents(r.Context(), all, func(events []maint.ScheduledEvent) error { return tell(events) })
	}), nil
}

func opID(r *http.Request) maint.OpID             { return maint.OpID(r.PathValue("id")) }
func campaignID(r *http.Request) maint.CampaignID { return maint.CampaignID(r.PathValue("id")) }
func eventID(r *http.Request) maint.EventID       { return maint.EventID(r.PathValue("id")) }

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
