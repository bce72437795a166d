package api

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"belay/agent/maint"
)

// Client speaks to one belayd. A refusal of the agent comes back as a
// *maint.Refusal or *maint.Problem; when the agent cannot be reached, as a
// *maint.Problem with CodePeerDown.
type Client struct {
	http *http.Client
	base string
	name string // for messages
	help string // remedy when it cannot be reached
	most int64  // bytes of an answer that are read
}

// NewUnix returns a client of the belayd behind a unix socket.
func NewUnix(socket string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}
	return &Client{base: "http://belayd", name: "belayd at " + socket,
		help: "see that it runs: systemctl status belayd",
		most: 256 << 20, // years of history
		http: &http.Client{CheckRedirect: stay, Transport: &http.Transport{DialContext: dial, ResponseHeaderTimeout: answerTimeout}}}
}

// answerTimeout is how long an answer may take to begin: more than belayd
// itself waits for libvirt or a peer.
const answerTimeout = 2 * time.Minute

// stay follows no redirect: belayd sends none, and what is meant for a peer
// may not go elsewhere.
func stay(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// NewTLS returns a client of the belayd at address (host:port), which it
// calls name. config has our certificate, the CA, and the peer's certificate
// name as ServerName.
func NewTLS(name, address string, config *tls.Config) *Client {
	return &Client{base: "https://" + address, name: "peer " + name,
		help: "see that belayd runs there, that " + address + " can be reached from here and that both trust the same CA",
		most: maxBody,
		http: &http.Client{CheckRedirect: stay, Transport: &http.Transport{ResponseHeaderTimeout: answerTimeout,
			TLSClientConfig: config, IdleConnTimeout: 90 * time.Second, MaxIdleConnsPerHost: 16, TLSHandshakeTimeout: 5 * time.Second,
			DialContext: (&net.Dialer{Timeout: 5 * time.Second}).DialContext}}}
}

// Close lets go of idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Status asks for the host's status.
func (c *Client) Status(ctx context.Context) (s maint.Status, err error) {
	return s, c.call(ctx, "GET", "/v1/status", nil, &s)
}

// Inventory asks for the host's guests.
func (c *Client) Inventory(ctx context.Context) (i maint.Inventory, err error) {
	return i, c.call(ctx, "GET", "/v1/guests", nil, &i)
}

// Doctor asks what is missing for each rung.
func (c *Client) Doctor(ctx context.Context) (checks []maint.Check, err error) {
	return checks, c.call(ctx, "GET", "/v1/doctor", nil, &checks)
}

// Ops asks for all operations, oldest first.
func (c *Client) Ops(ctx context.Context) (ops []maint.Op, err error) {
	return ops, c.call(ctx, "GET", "/v1/ops", nil, &ops)
}

// opPath is an operation's place in the API. Names that mean something in a
// path are asked for quoted, which no operation is called either.
func opPath(id maint.OpID) string {
	switch id {
	case "", ".", "..":
		id = maint.OpID(strconv.Quote(string(id)))
	}
	return "/v1/ops/" + segment(string(id))
}

// Op asks for one operation.
func (c *Client) Op(ctx context.Context, id maint.OpID) (op maint.Op, err error) {
	return op, c.call(ctx, "GET", opPath(id), nil, &op)
}

// Records asks for the journal of one operation.
func (c *Client) Records(ctx context.Context, id maint.OpID) (recs []maint.Record, err error) {
	return recs, c.call(ctx, "GET", opPath(id)+"/records", nil, &recs)
}

// Report asks what an operation came to.
func (c *Client) Report(ctx context.Context, id maint.OpID) (r maint.Report, err error) {
	return r, c.call(ctx, "GET", opPath(id)+"/report", nil, &r)
}

// Migrate asks for a migration and returns the admitted operation.
func (c *Client) Migrate(ctx context.Context, r maint.MigrateRequest) (op maint.Op, err error) {
	return op, c.call(ctx, "POST", "/v1/migrations", r, &op)
}

// Hold asks for guests to be held around a host step and returns the admitted
// operation.
func (c *Client) Hold(ctx context.Context, r maint.HoldRequest) (op maint.Op, err error) {
	return op, c.call(ctx, "POST", "/v1/holds", r, &op)
}

// Replace asks for a new QEMU under a guest and returns the admitted operation.
func (c *Client) Replace(ctx context.Context, r maint.ReplaceRequest) (op maint.Op, err error) {
	return op, c.call(ctx, "POST", "/v1/replacements", r, &op)
}

// ReplaceChoices asks what each method of that would cost a guest.
func (c *Client) ReplaceChoices(ctx context.Context, guest string) (cs []maint.VMMChoice, err error) {
	return cs, c.call(ctx, "GET", "/v1/guests/"+segment(guest)+"/replacements", nil, &cs)
}

// Moves asks whether a guest, or with "" each, could be moved to a peer, or with
// "" to each.
func (c *Client) Moves(ctx context.Context, guest, to string) (vs []maint.MoveVerdict, err error) {
	return vs, c.call(ctx, "GET", "/v1/moves?"+url.Values{"guest": {guest}, "to": {to}}.Encode(), nil, &vs)
}

// Ladder asks which rungs can be taken with a guest, or with "" with each that runs.
func (c *Client) Ladder(ctx context.Context, guest string) (v maint.LadderView, err error) {
	return v, c.call(ctx, "GET", "/v1/ladder?guest="+url.QueryEscape(guest), nil, &v)
}

// Clock asks for a guest's clock to be measured, or with "" for all.
func (c *Client) Clock(ctx context.Context, guest string) (rs []maint.ClockReport, err error) {
	return rs, c.call(ctx, "GET", "/v1/clocks?guest="+url.QueryEscape(guest), nil, &rs)
}

// SyncClock asks for clocks that are behind to be stepped forward.
func (c *Client) SyncClock(ctx context.Context, guest string) (rs []maint.ClockReport, err error) {
	return rs, c.call(ctx, "POST", "/v1/clocks?guest="+url.QueryEscape(guest), nil, &rs)
}

// Abort asks for an operation to be aborted; it ends some time later.
func (c *Client) Abort(ctx context.Context, id maint.OpID) (op maint.Op, err error) {
	return op, c.call(ctx, "POST", opPath(id)+"/abort", nil, &op)
}

// AbortNow is Abort, also of what runs of a drain or a restore.
func (c *Client) AbortNow(ctx context.Context, id maint.OpID) (op maint.Op, err error) {
	return op, c.call(ctx, "POST", opPath(id)+"/abort?now=1", nil, &op)
}

// Drain asks for every guest to be moved to peers and returns the admitted operation.
func (c *Client) Drain(ctx context.Context, r maint.DrainRequest) (op maint.Op, err error) {
	return op, c.call(ctx, "POST", "/v1/drains", r, &op)
}

// PlanDrain asks what that would do.
func (c *Client) PlanDrain(ctx context.Context, r maint.DrainRequest) (p maint.DrainPlan, err error) {
	return p, c.call(ctx, "POST", "/v1/drains/plan", r, &p)
}

// Restore asks for what a drain has moved to be brought back and returns the admitted
// operation.
func (c *Client) Restore(ctx context.Context, r maint.RestoreRequest) (op maint.Op, err error) {
	return op, c.call(ctx, "POST", "/v1/restores", r, &op)
}

// Plan asks how an update would be done.
func (c *Client) Plan(ctx context.Context, r maint.PlanRequest) (p maint.Plan, err error) {
	return p, c.call(ctx, "POST", "/v1/plans", r, &p)
}

// CheckPlan asks whether a plan could be carried out now; the error says why not.
func (c *Client) CheckPlan(ctx context.Context, p maint.Plan) error {
	return c.call(ctx, "POST", "/v1/applies/check", maint.ApplyRequest{Plan: p}, nil)
}

// Apply has a plan be carried out.
func (c *Client) Apply(ctx context.Context, r maint.ApplyRequest) (op maint.Op, err error) {
	return op, c.call(ctx, "POST", "/v1/applies", r, &op)
}

// ProposeUpdate asks for a manifest of what is pending.
func (c *Client) ProposeUpdate(ctx context.Context) (p maint.Proposal, err error) {
	return p, c.call(ctx, "GET", "/v1/updates/pending", nil, &p)
}

// Policies lists the policies of all guests.
func (c *Client) Policies(ctx context.Context) (all []maint.PolicyView, err error) {
	return all, c.call(ctx, "GET", "/v1/policies", nil, &all)
}

// Policy asks for that of one.
func (c *Client) Policy(ctx context.Context, guest string) (v maint.PolicyView, err error) {
	return v, c.call(ctx, "GET", "/v1/guests/"+segment(guest)+"/policy", nil, &v)
}

// SetPolicy gives a guest another one.
func (c *Client) SetPolicy(ctx context.Context, guest string, p maint.GuestPolicy) (v maint.PolicyView, err error) {
	return v, c.call(ctx, "PUT", "/v1/guests/"+segment(guest)+"/policy", p, &v)
}

// Patches asks what is changed of the running host.
func (c *Client) Patches(ctx context.Context) (v maint.PatchView, err error) {
	return v, c.call(ctx, "GET", "/v1/patches", nil, &v)
}

// Patch asks for a change of the running host and returns the admitted operation.
func (c *Client) Patch(ctx context.Context, r maint.PatchRequest) (op maint.Op, err error) {
	return op, c.call(ctx, "POST", "/v1/patches", r, &op)
}

// InspectPatch asks for a livepatch's files on the host to be judged.
func (c *Client) InspectPatch(ctx context.Context, file string) (f maint.PatchFile, err error) {
	return f, c.call(ctx, "POST", "/v1/patches/inspect", File{file}, &f)
}

// Coverage asks whether the running kernel is mended of a change.
func (c *Client) Coverage(ctx context.Context, change string) (v maint.Coverage, err error) {
	return v, c.call(ctx, "GET", "/v1/patches/coverage?change="+url.QueryEscape(change), nil, &v)
}

// Kexec asks for another kernel under the guests and returns the admitted operation.
func (c *Client) Kexec(ctx context.Context, r maint.KexecRequest) (op maint.Op, err error) {
	return op, c.call(ctx, "POST", "/v1/kexecs", r, &op)
}

// PlanKexec asks what that would do.
func (c *Client) PlanKexec(ctx context.Context, r maint.KexecRequest) (v maint.KexecPlan, err error) {
	return v, c.call(ctx, "POST", "/v1/kexecs/plan", r, &v)
}

// Cordon has the host take no guests in.
func (c *Client) Cordon(ctx context.Context, reason string) (k maint.Cordon, err error) {
	return k, c.call(ctx, "PUT", "/v1/cordon", Reason{reason}, &k)
}

// Uncordon has it take guests in again.
func (c *Client) Uncordon(ctx context.Context) error {
	return c.call(ctx, "DELETE", "/v1/cordon", nil, nil)
}

// Watch calls f with the operation now and after every change until it has
// ended, then returns it as it ended.
func (c *Client) Watch(ctx context.Context, id maint.OpID, f func(maint.Op)) (maint.Op, error) {
	return c.watch(ctx, opPath(id)+"/watch", f)
}

func (c *Client) watch(ctx context.Context, path string, f func(maint.Op)) (maint.Op, error) {
	var op maint.Op
	resp, err := c.do(ctx, "GET", path, nil)
	if err != nil {
		return op, err
	}
	defer resp.Body.Close()
	body := &io.LimitedReader{R: resp.Body}
	d := json.NewDecoder(bufio.NewReader(body))
	for op.State != maint.OpEnded {
		op = maint.Op{}
		body.N = c.most
		if err := d.Decode(&op); err != nil {
			return op, c.unreachable(ctx, err)
		}
		f(op)
	}
	return op, nil
}

// Events lists scheduled events, those that are over only with all.
func (c *Client) Events(ctx context.Context, all bool) (events []maint.ScheduledEvent, err error) {
	return events, c.call(ctx, "GET", "/v1/events?all="+digit(all), nil, &events)
}

func digit(b bool) string {
	if b {
		return "1"
	}
	return "0"
}

func eventPath(id maint.EventID) string { return "/v1/events/" + segment(string(id)) }

// Event looks one up.
func (c *Client) Event(ctx context.Context, id maint.EventID) (e maint.ScheduledEvent, err error) {
	return e, c.call(ctx, "GET", eventPath(id), nil, &e)
}

// ApproveEvent has one start as soon as it can.
func (c *Client) ApproveEvent(ctx context.Context, id maint.EventID, reason string) (e maint.ScheduledEvent, err error) {
	return e, c.call(ctx, "POST", eventPath(id)+"/approve", Reason{reason}, &e)
}

// CancelEvent calls one off that has not started.
func (c *Client) CancelEvent(ctx context.Context, id maint.EventID, reason string) (e maint.ScheduledEvent, err error) {
	return e, c.call(ctx, "POST", eventPath(id)+"/cancel", Reason{reason}, &e)
}

// WatchEvents calls f with the scheduled events now and after every change, until
// f fails or ctx ends.
func (c *Client) WatchEvents(ctx context.Context, all bool, f func([]maint.ScheduledEvent) error) error {
	resp, err := c.do(ctx, "GET", "/v1/events?watch=1&all="+digit(all), nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body := &io.LimitedReader{R: resp.Body}
	for d := json.NewDecoder(bufio.NewReader(body)); ; {
		var events []maint.ScheduledEvent
		body.N = c.most
		if err := d.Decode(&events); err != nil {
			return c.unreachable(ctx, err)
		}
		if err := f(events); err != nil {
			return err
		}
	}
}

// segment is a text as a segment of a path: one or two dots would be steps in it.
func segment(s string) string {
	if s == "." || s == ".." {
		return strings.ReplaceAll(s, ".", "%2E")
	}
	return url.PathEscape(s)
}

func campaignPath(id maint.CampaignID) string { return "/v1/campaigns/" + segment(string(id)) }

// Campaigns lists maintenance campaigns, the oldest first.
func (c *Client) Campaigns(ctx context.Context) (all []maint.Campaign, err error) {
	return all, c.call(ctx, "GET", "/v1/campaigns", nil, &all)
}

// Campaign looks one up.
func (c *Client) Campaign(ctx context.Context, id maint.CampaignID) (k maint.Campaign, err error) {
	return k, c.call(ctx, "GET", campaignPath(id), nil, &k)
}

// CreateCampaign makes one.
func (c *Client) CreateCampaign(ctx context.Context, r maint.CampaignRequest) (k maint.Campaign, err error) {
	return k, c.call(ctx, "POST", "/v1/campaigns", r, &k)
}

// BookCampaign picks the moment for a guest, the zero time for now.
func (c *Client) BookCampaign(ctx context.Context, id maint.CampaignID, b Booking) (k maint.Campaign, err error) {
	return k, c.call(ctx, "POST", campaignPath(id)+"/book", b, &k)
}

// DeferCampaign takes back what was picked for a guest.
func (c *Client) DeferCampaign(ctx context.Context, id maint.CampaignID, guest string) (k maint.Campaign, err error) {
	return k, c.call(ctx, "POST", campaignPath(id)+"/defer", Booking{Guest: guest}, &k)
}

// CloseCampaign calls one off.
func (c *Client) CloseCampaign(ctx context.Context, id maint.CampaignID) (k maint.Campaign, err error) {
	return k, c.call(ctx, "POST", campaignPath(id)+"/close", nil, &k)
}

// Check asks a peer whether a guest may come.
func (c *Client) Check(ctx context.Context, a maint.Arrival) (ps []maint.Problem, err error) {
	return ps, c.call(ctx, "POST", "/v1/peer/checks", a, &ps)
}

// Reserve asks a peer to keep room for a guest, or to keep it longer, and where it takes
// its memory in. An older peer says nothing of that.
func (c *Client) Reserve(ctx context.Context, a maint.Arrival) (l maint.Landing, err error) {
	return l, c.call(ctx, "PUT", "/v1/peer/reservations/"+segment(string(a.Op)), a, &l)
}

// Release gives that room up.
func (c *Client) Release(ctx context.Context, op maint.OpID) error {
	return c.call(ctx, "DELETE", "/v1/peer/reservations/"+segment(string(op)), nil, nil)
}

// Connections asks a peer to hold the connections by which a guest comes to it in post-copy,
// or to end them.
func (c *Client) Connections(ctx context.Context, op maint.OpID, q maint.Connections) error {
	return c.call(ctx, "PUT", "/v1/peer/reservations/"+segment(string(op))+"/connections", q, nil)
}

// View asks what a peer has of a guest.
func (c *Client) View(ctx context.Context, uuid string) (v maint.View, err error) {
	return v, c.call(ctx, "GET", "/v1/peer/guests/"+segment(uuid), nil, &v)
}

// Settle asks a peer to keep an arrived guest as the source did.
func (c *Client) Settle(ctx context.Context, s maint.Settlement) error {
	return c.call(ctx, "POST", "/v1/peer/settlements", s, nil)
}

// CompletedJob asks a peer for the statistics of a guest's arrival.
func (c *Client) CompletedJob(ctx context.Context, uuid string) (j maint.Job, err error) {
	return j, c.call(ctx, "GET", "/v1/peer/guests/"+segment(uuid)+"/job", nil, &j)
}

// Arrival asks a peer what it did for a guest that has come from here by operation
// id, and waits for it.
func (c *Client) Arrival(ctx context.Context, id maint.OpID) (r maint.ArrivalReport, err error) {
	return r, c.call(ctx, "GET", "/v1/peer/arrivals/"+segment(string(id)), nil, &r)
}

// Room asks a peer what it has room for.
func (c *Client) Room(ctx context.Context) (r maint.PeerRoom, err error) {
	return r, c.call(ctx, "GET", "/v1/peer/room", nil, &r)
}

// Return asks a peer to migrate a guest back that came from here.
func (c *Client) Return(ctx context.Context, r maint.ReturnRequest) (op maint.Op, err error) {
	return op, c.call(ctx, "POST", "/v1/peer/returns", r, &op)
}

// WatchReturn is Watch of such a migration.
func (c *Client) WatchReturn(ctx context.Context, id maint.OpID, f func(maint.Op)) (maint.Op, error) {
	return c.watch(ctx, "/v1/peer/returns/"+segment(string(id))+"/watch", f)
}

// AbortReturn asks for one to be aborted.
func (c *Client) AbortReturn(ctx context.Context, id maint.OpID) error {
	return c.call(ctx, "POST", "/v1/peer/returns/"+segment(string(id))+"/abort", nil, nil)
}

// Greeting asks a peer to introduce itself.
func (c *Client) Greeting(ctx context.Context) (g Greeting, err error) {
	return g, c.call(ctx, "GET", "/v1/peer/greeting", nil, &g)
}

func (c *Client) call(ctx context.Context, method, path string, body, answer any) error {
	resp, err := c.do(ctx, method, path, body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	read := io.LimitReader(resp.Body, c.most)
	if answer == nil {
		// The status said it all; the rest is read for the connection's sake.
		_, _ = io.Copy(io.Discard, read)
		return nil
	}
	if err := json.NewDecoder(read).Decode(answer); err != nil {
		return c.unreachable(ctx, fmt.Errorf("its answer to %s %s cannot be read: %w", method, path, err))
	}
	return nil
}

// do sends the request and turns a refusal into an error.
func (c *Client) do(ctx context.Context, method, path string, body any) (*http.Response, error) {
	var r io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		r = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, r)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.unreachable(ctx, err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer resp.Body.Close()
	var f failure
	if err := json.NewDecoder(io.LimitReader(resp.Body, c.most)).Decode(&f); err != nil || f.Error == nil || len(f.Error.Problems) == 0 {
		return nil, c.unreachable(ctx, fmt.Errorf("it answered %s", resp.Status))
	}
	if f.Error.What == "" && len(f.Error.Problems) == 1 {
		return nil, &f.Error.Problems[0]
	}
	return nil, f.Error
}

func (c *Client) unreachable(ctx context.Context, err error) error {
	// A caller who stops waiting has learnt nothing about the other side.
	if errors.Is(ctx.Err(), context.Canceled) {
		return fmt.Errorf("gave up asking %s: %w", c.name, ctx.Err())
	}
	return maint.Problemf(maint.CodePeerDown, c.name, c.help, "cannot be reached: %v", err)
}
