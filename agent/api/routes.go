package api

import (
	"context"
	"net/http"

	"belay/agent/maint"
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
