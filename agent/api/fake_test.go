package api

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"belay/agent/maint"
)

var quiet = slog.New(slog.DiscardHandler)

// fakeAgent answers with what it is given and remembers what it was asked.
type fakeAgent struct {
	err     error // given by every call
	records []maint.Record
	watched []maint.Op // what Watch tells
	cut     error      // what Watch ends with

	mu    sync.Mutex
	calls []string // "Migrate root"
}

func (f *fakeAgent) called(what, who string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if who != "" {
		what += " " + who
	}
	f.calls = append(f.calls, what)
	return f.err
}

// taken returns the calls since the last time.
func (f *fakeAgent) taken() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	calls := f.calls
	f.calls = nil
	return calls
}

func (f *fakeAgent) Status(context.Context) (maint.Status, error) {
	return maint.Status{Version: "fake"}, f.called("Status", "")
}

func (f *fakeAgent) Inventory(context.Context) (maint.Inventory, error) {
	return maint.Inventory{}, f.called("Inventory", "")
}

func (f *fakeAgent) Doctor(context.Context) ([]maint.Check, error) {
	return nil, f.called("Doctor", "")
}

func (f *fakeAgent) Ops(context.Context) ([]maint.Op, error) { return nil, f.called("Ops", "") }

func (f *fakeAgent) Op(_ context.Context, id maint.OpID) (maint.Op, error) {
	return maint.Op{ID: id}, f.called("Op", string(id))
}

func (f *fakeAgent) Records(_ context.Context, id maint.OpID) ([]maint.Record, error) {
	return append([]maint.Record(nil), f.records...), f.called("Records", string(id))
}

func (f *fakeAgent) Report(_ context.Context, id maint.OpID) (maint.Report, error) {
	return maint.Report{Op: id}, f.called("Report", string(id))
}

func (f *fakeAgent) Watch(_ context.Context, id maint.OpID, tell func(maint.Op) error) error {
	if err := f.called("Watch", string(id)); err != nil {
		return err
	}
	for _, op := range f.watched {
		if err := tell(op); err != nil {
			return err
		}
	}
	return f.cut
}

func (f *fakeAgent) Migrate(_ context.Context, by string, r maint.MigrateRequest) (maint.Op, error) {
	return maint.Op{ID: "mig-1", By: by, Guest: r.Guest, Peer: r.To}, f.called("Migrate", by)
}

func (f *fakeAgent) AbortNow(_ context.Context, by string, id maint.OpID) (maint.Op, error) {
	return maint.Op{ID: id}, f.called("AbortNow "+string(id), by)
}

func (f *fakeAgent) Drain(_ context.Context, by string, r maint.DrainRequest) (maint.Op, error) {
	return maint.Op{ID: "drain-1", By: by, Drain: &r}, f.called("Drain", by)
}

func (f *fakeAgent) PlanDrain(_ context.Context, r maint.DrainRequest) (maint.DrainPlan, error) {
	return maint.DrainPlan{}, f.called("PlanDrain", strings.Join(r.To, ","))
}

func (f *fakeAgent) Restore(_ context.Context, by string, r maint.RestoreRequest) (maint.Op, error) {
	return maint.Op{ID: "restore-1", By: by, Restore: &r}, f.called("Restore "+string(r.Drain), by)
}

func (f *fakeAgent) Room(context.Context) (maint.PeerRoom, error) {
	return maint.PeerRoom{}, f.called("Room", "")
}

func (f *fakeAgent) Return(_ context.Context, from string, r maint.ReturnRequest) (maint.Op, error) {
	return maint.Op{ID: "mig-1", Return: &r}, f.called("Return "+r.Token, from)
}

func (f *fakeAgent) WatchReturn(ctx context.Context, from string, id maint.OpID, tell func(maint.Op) error) error {
	return f.called("WatchReturn "+string(id), from)
}

func (f *fakeAgent) Connections(_ context.Context, from string, id maint.OpID, c maint.Connections) error {
	return f.called(fmt.Sprintf("Connections %s %v", id, c.End), from)
}

func (f *fakeAgent) AbortReturn(_ context.Context, from string, id maint.OpID) (maint.Op, error) {
	return maint.Op{ID: id}, f.called("AbortReturn "+string(id), from)
}

func (f *fakeAgent) Kexec(_ context.Context, by string, r maint.KexecRequest) (maint.Op, error) {
	return maint.Op{}, f.called("Kexec "+r.Kernel, by)
}

func (f *fakeAgent) PlanKexec(_ context.Context, by string, r maint.KexecRequest) (maint.KexecPlan, error) {
	return maint.KexecPlan{}, f.called("PlanKexec "+r.Kernel, by)
}

func (f *fakeAgent) Plan(_ context.Context, r maint.PlanRequest) (maint.Plan, error) {
	return maint.Plan{}, f.called("Plan "+r.Manifest, "")
}

func (f *fakeAgent) CheckPlan(_ context.Context, p maint.Plan) error {
	return f.called("CheckPlan "+p.Hash, "")
}

func (f *fakeAgent) Apply(_ context.Context, by string, r maint.ApplyRequest) (maint.Op, error) {
	return maint.Op{}, f.called("Apply "+r.Plan.Hash, by)
}

func (f *fakeAgent) ProposeUpdate(context.Context) (maint.Proposal, error) {
	return maint.Proposal{}, f.called("ProposeUpdate", "")
}

func (f *fakeAgent) Policies(context.Context) ([]maint.PolicyView, error) {
	return nil, f.called("Policies", "")
}

func (f *fakeAgent) Policy(_ context.Context, guest string) (maint.PolicyView, error) {
	return maint.PolicyView{}, f.called("Policy "+guest, "")
}

func (f *fakeAgent) SetPolicy(_ context.Context, by, guest string, p maint.GuestPolicy) (maint.PolicyView, error) {
	return maint.PolicyView{}, f.called(fmt.Sprintf("SetPolicy %s %v", guest, p.Refuse), by)
}

func (f *fakeAgent) Patches(context.Context) (maint.PatchView, error) {
	return maint.PatchView{}, f.called("Patches", "")
}

func (f *fakeAgent) Patch(_ context.Context, by string, r maint.PatchRequest) (maint.Op, error) {
	return maint.Op{}, f.called("Patch "+string(r.Action)+" "+r.Name, by)
}

func (f *fakeAgent) InspectPatch(_ context.Context, file string) (maint.PatchFile, error) {
	return maint.PatchFile{}, f.called("InspectPatch "+file, "")
}

func (f *fakeAgent) Coverage(_ context.Context, change string) (maint.Coverage, error) {
	return maint.Coverage{}, f.called("Coverage "+change, "")
}

func (f *fakeAgent) Cordon(_ context.Context, by, reason string) (maint.Cordon, error) {
	return maint.Cordon{By: by, Reason: reason}, f.called("Cordon "+reason, by)
}

func (f *fakeAgent) Uncordon(_ context.Context, by string) error { return f.called("Uncordon", by) }

func (f *fakeAgent) Hold(_ context.Context, by string, r maint.HoldRequest) (maint.Op, error) {
	return maint.Op{ID: "hold-1", By: by, Hold: &r}, f.called("Hold", by)
}

func (f *fakeAgent) Replace(_ context.Context, by string, r maint.ReplaceRequest) (maint.Op, error) {
	return maint.Op{ID: "vmm-1", By: by, Replace: &r}, f.called("Replace", by)
}

func (f *fakeAgent) ReplaceChoices(_ context.Context, guest string) ([]maint.VMMChoice, error) {
	return []maint.VMMChoice{{Method: maint.VMMCopy}}, f.called("ReplaceChoices "+guest, "")
}

func (f *fakeAgent) Rungs(_ context.Context, guest string) (maint.LadderView, error) {
	return maint.LadderView{}, f.called("Rungs "+guest, "")
}

func (f *fakeAgent) Moves(_ context.Context, guest, to string) ([]maint.MoveVerdict, error) {
	return []maint.MoveVerdict{{Guest: guest, Peer: to}}, f.called("Moves "+guest+" "+to, "")
}

func (f *fakeAgent) Events(_ context.Context, all bool) ([]maint.ScheduledEvent, error) {
	return nil, f.called("Events "+strconv.FormatBool(all), "")
}

func (f *fakeAgent) Event(_ context.Context, id maint.EventID) (maint.ScheduledEvent, error) {
	return maint.ScheduledEvent{}, f.called("Event "+string(id), "")
}

func (f *fakeAgent) WatchEvents(_ context.Context, all bool, tell func([]maint.ScheduledEvent) error) error {
	return cmp.Or(tell([]maint.ScheduledEvent{{ID: "e"}}), f.called("WatchEvents "+strconv.FormatBool(all), ""))
}

func (f *fakeAgent) ApproveEvent(_ context.Context, by string, id maint.EventID, reason string) (maint.ScheduledEvent, error) {
	return maint.ScheduledEvent{}, f.called("ApproveEvent "+string(id)+" "+reason, by)
}

func (f *fakeAgent) CancelEvent(_ context.Context, by string, id maint.EventID, reason string) (maint.ScheduledEvent, error) {
	return maint.ScheduledEvent{}, f.called("CancelEvent "+string(id)+" "+reason, by)
}

func (f *fakeAgent) Campaigns(context.Context) ([]maint.Campaign, error) {
	return nil, f.called("Campaigns", "")
}

func (f *fakeAgent) Campaign(_ context.Context, id maint.CampaignID) (maint.Campaign, error) {
	return maint.Campaign{}, f.called("Campaign "+string(id), "")
}

func (f *fakeAgent) CreateCampaign(_ context.Context, by string, r maint.CampaignRequest) (maint.Campaign, error) {
	return maint.Campaign{}, f.called("CreateCampaign "+string(r.ID), by)
}

func (f *fakeAgent) BookCampaign(_ context.Context, by string, id maint.CampaignID, guest string, at time.Time) (maint.Campaign, error) {
	return maint.Campaign{}, f.called("BookCampaign "+string(id)+" "+guest+" "+strconv.FormatBool(at.IsZero()), by)
}

func (f *fakeAgent) DeferCampaign(_ context.Context, id maint.CampaignID, guest string) (maint.Campaign, error) {
	return maint.Campaign{}, f.called("DeferCampaign "+string(id)+" "+guest, "")
}

func (f *fakeAgent) CloseCampaign(_ context.Context, id maint.CampaignID) (maint.Campaign, error) {
	return maint.Campaign{}, f.called("CloseCampaign "+string(id), "")
}

func (f *fakeAgent) Clock(_ context.Context, guest string) ([]maint.ClockReport, error) {
	return []maint.ClockReport{{Guest: guest}}, f.called("Clock "+guest, "")
}

func (f *fakeAgent) SyncClock(_ context.Context, by, guest string) ([]maint.ClockReport, error) {
	return []maint.ClockReport{{Guest: guest}}, f.called("SyncClock "+guest, by)
}

func (f *fakeAgent) Arrival(_ context.Context, from string, id maint.OpID) (maint.ArrivalReport, error) {
	return maint.ArrivalReport{}, f.called("Arrival "+string(id), from)
}

func (f *fakeAgent) Abort(_ context.Context, by string, id maint.OpID) (maint.Op, error) {
	return maint.Op{ID: id}, f.called("Abort "+string(id), by)
}

func (f *fakeAgent) Check(_ context.Context, from string, a maint.Arrival) ([]maint.Problem, error) {
	return nil, f.called("Check", from)
}

func (f *fakeAgent) Reserve(_ context.Context, from string, a maint.Arrival) (maint.Landing, error) {
	return maint.Landing{URI: "tcp://192.0.2.2"}, f.called("Reserve "+string(a.Op), from)
}

func (f *fakeAgent) Release(_ context.Context, from string, id maint.OpID) error {
	return f.called("Release "+string(id), from)
}

func (f *fakeAgent) View(_ context.Context, uuid string) (maint.View, error) {
	return maint.View{}, f.called("View", uuid)
}

func (f *fakeAgent) Settle(_ context.Context, from string, s maint.Settlement) error {
	return f.called("Settle "+string(s.Op), from)
}

func (f *fakeAgent) CompletedJob(_ context.Context, uuid string) (maint.Job, error) {
	return maint.Job{}, f.called("CompletedJob", uuid)
}

func (f *fakeAgent) Greeting(context.Context) (Greeting, error) {
	return Greeting{Version: "fake"}, f.called("Greeting", "")
}

func (f *fakeAgent) CheckFiles(context.Context, maint.FilesQuestion) ([]maint.FileView, error) {
	return nil, f.called("CheckFiles", "")
}

func (f *fakeAgent) MakeDisks(_ context.Context, from string, id maint.OpID) error {
	return f.called("MakeDisks "+string(id), from)
}

func (f *fakeAgent) RemoveDisks(_ context.Context, from string, id maint.OpID) error {
	return f.called("RemoveDisks "+string(id), from)
}

func (f *fakeAgent) MoveEnd(_ context.Context, from string, id maint.OpID) (maint.MoveEnd, error) {
	return maint.MoveOpen, f.called("MoveEnd "+string(id), from)
}

// as identifies everybody as one caller.
func as(name string, role maint.Role) Identify {
	return func(*http.Request) Caller { return Caller{Name: name, Role: role} }
}

// serveUnix serves f on a unix socket that everybody can reach.
func serveUnix(t *testing.T, f Agent, who Access) (socket string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "api") // short, for the socket's sake
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(dir, "sock")
	s := NewServers(quiet)
	if err := s.ListenUnix(socket, f, who); err != nil {
		t.Fatal(err)
	}
	serve(t, s)
	return socket
}

// serveTLS serves f to certificates and returns its address.
func serveTLS(t *testing.T, f Agent, who Access, id Identity) (address string) {
	t.Helper()
	s := NewServers(quiet)
	if err := s.ListenTLS("127.0.0.1:0", id, f, who); err != nil {
		t.Fatal(err)
	}
	serve(t, s)
	return s.all[0].listener.Addr().String()
}

func serve(t *testing.T, s *Servers) {
	failed := make(chan error, 1)
	s.Serve(failed)
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		s.Close(ctx)
		select {
		case err := <-failed:
			t.Error("a server failed:", err)
		default:
		}
	})
}

// problemOf gives the one problem in err.
func problemOf(t *testing.T, err error) *maint.Problem {
	t.Helper()
	var p *maint.Problem
	if !errors.As(err, &p) {
		t.Fatalf("want a *maint.Problem, there is %T: %v", err, err)
	}
	return p
}
