package agent

import (
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"time"
	"unicode"

	"belay/agent/api"
	"belay/agent/maint"
	"belay/migrate"
)

// reservationLife is how long room is kept for a guest whose source is not
// heard of any more. The source renews it every twenty seconds.
const reservationLife = 90 * time.Second

// renewedLately is how long after it was written down a reservation need not be written down
// anew.
const renewedLately = 5 * time.Second

// maxName is the longest name or ID a peer may have kept here, bytes: a guest's
// name is a file's name with libvirt.
const maxName = 255

// Greeting introduces this host to a peer.
func (a *Agent) Greeting(context.Context) (api.Greeting, error) {
	return api.Greeting{Host: a.view.last.Load().host, Version: a.version, Now: time.Now(), Cordoned: a.journal.Cordon() != nil}, nil
}

// Check lists why a guest cannot come here.
func (a *Agent) Check(ctx context.Context, from string, r maint.Arrival) ([]maint.Problem, error) {
	if err := r.Validate(); err != nil {
		return nil, err
	}
	host, err := a.hyp.Info(ctx)
	if err != nil {
		return nil, a.downProblem(err)
	}
	guests, err := a.hyp.Guests(ctx)
	if err != nil {
		return nil, a.downProblem(err)
	}
	host.Name = a.cfg.Host
	kept, _ := a.promises(from, r)
	room := migrate.Room{Host: host, Guests: guests, Reservations: kept,
		MemoryLimit: a.cfg.Limits.GuestMemory.Bytes, MemoryReserve: a.cfg.Limits.MemoryReserve.Bytes}
	if len(r.Pages) > 0 {
		room.HugePageBytes = a.local.HugePageBytes()
		if room.HugePages, err = a.hyp.HugePages(ctx); err != nil {
			return nil, a.downProblem(err)
		}
	}
	ps := migrate.CheckArrival(ctx, r, room, a.hyp)
	ps = append(ps, a.apart(r, guests, kept)...)
	ps = append(ps, a.checkDisks(ctx, r)...)
	if r.Needs != nil {
		needs, err := a.checkNeeds(ctx, *r.Needs)
		if err != nil {
			return nil, err
		}
		ps = append(ps, needs...)
	}
	_, way := a.gate().CheckWay(r.Way, a.wiring(r.Way))
	ps = append(ps, way...)
	if c := a.journal.Cordon(); c != nil {
		ps = append(ps, *maint.Problemf(maint.CodeCordoned, "host "+a.cfg.Host, "choose another host, or have it take guests in again (belay uncordon, there)",
			"takes no guests in: it was cordoned by %s at %s%s", c.By, c.Since.Format(time.RFC3339), c.Why()))
	}
	all, _ := a.elsewhere()
	for _, e := range all {
		if !e.Open && (e.is(r.Guest) || e.is(r.GuestUUID)) {
			ps = append(ps, *e.problem())
		}
	}
	for _, op := range a.journal.Ops() {
		switch {
		case op.State == maint.OpEnded:
		case ofAll(op): // it would run while all others are held
			ps = append(ps, *maint.Problemf(maint.CodeBusy, "host "+a.cfg.Host, "wait for it to end",
				"operation %s holds all guests there", op.ID))
		case op.GuestUUID == r.GuestUUID:
			ps = append(ps, *maint.Problemf(maint.CodeBusy, "host "+a.cfg.Host, "wait for it to end",
				"operation %s is still at work on guest %s here", op.ID, op.Guest))
		}
	}
	return ps, nil
}

// gate is what this host demands of the way that guests' memory comes.
func (a *Agent) gate() migrate.Gate {
	address, _ := netip.ParseAddr(a.cfg.Migration.Address) // "" is none
	return migrate.Gate{Host: a.cfg.Host, TLS: a.cfg.Migration.TLS, Address: address}
}

// wiring looks at what this host has for a guest's memory, if its source says how that
// is to come.
func (a *Agent) wiring(w *maint.Way) migrate.Wiring {
	if w == nil {
		return migrate.Wiring{}
	}
	return a.local.Wiring()
}

// checkNeeds lists what a guest needs and this host does not have.
func (a *Agent) checkNeeds(ctx context.Context, n maint.Needs) ([]maint.Problem, error) {
	var s maint.Supplies
	if len(n.Networks)+len(n.Pools)+len(n.Secrets) > 0 {
		var err error
		if s, err = a.hyp.Supplies(ctx); err != nil {
			return nil, a.downProblem(err)
		}
	}
	return migrate.CheckNeeds(n, a.cfg.Host, a.local.Look(ctx, n), s), nil
}

func (a *Agent) downProblem(err error) error {
	if errors.Is(err, maint.ErrHypervisorDown) {
		return maint.Problemf(maint.CodeHypervisorDown, "host "+a.cfg.Host,
			"see that libvirtd or virtqemud runs there (systemctl status libvirtd virtqemud)", "%v", err)
	}
	return err
}

// promises are the reservations in force, and apart from them those that r
// replaces: a source has one operation at a time for a guest, so an earlier
// one of its own is over, and could only not be given up in time. A lapsed one
// of anybody's would let its holder settle the guest after it has come from
// elsewhere.
func (a *Agent) promises(from string, r maint.Arrival) (kept, replaced []maint.Reservation) {
	now := time.Now()
	for _, res := range a.journal.Reservations(time.Time{}) { // the lapsed, too
		lapsed := !res.Expires.After(now)
		switch {
		case res.Op != r.Op && res.GuestUUID == r.GuestUUID && (lapsed || res.From == from):
			replaced = append(replaced, res)
		case !lapsed:
			kept = append(kept, res)
		}
	}
	return kept, replaced
}

// Reserve keeps room for a guest on its way here, or keeps it longer, and says where its
// memory is taken in.
func (a *Agent) Reserve(ctx context.Context, from string, r maint.Arrival) (maint.Landing, error) {
	landing, _ := a.gate().CheckWay(r.Way, a.wiring(r.Way))
	landing.Vigil = a.vigil.of(r.GuestUUID)
	return landing, a.reserve(ctx, from, r)
}

func (a *Agent) reserve(ctx context.Context, from string, r maint.Arrival) error {
	if err := r.Validate(); err != nil {
		return err
	}
	// Names and IDs end up in journals, messages and commands.
	for field, text := range map[string]string{"op": string(r.Op), "guest": r.Guest, "guest_uuid": r.GuestUUID} {
		if len(text) > maxName || strings.ContainsFunc(text, func(c rune) bool { return !unicode.IsPrint(c) }) {
			return maint.Problemf(maint.CodeBadRequest, "arrival: "+field, "send one without control characters",
				"%.60q is longer than %d bytes or has control characters", text, maxName)
		}
	}
	r.Needs = nil // others do not wait for storage that it names
	a.arrivals.Lock()
	defer a.arrivals.Unlock()
	if _, own := a.journal.Op(r.Op); own {
		return maint.Problemf(maint.CodeForbidden, "reservation "+string(r.Op), "", "is an operation of %s itself", a.cfg.Host)
	}
	// An ID stays its first holder's, also when the room has lapsed.
	if res, ok := a.journal.Reservation(r.Op); ok && (res.From != from || res.GuestUUID != r.GuestUUID) {
		return maint.Problemf(maint.CodeForbidden, "reservation "+string(r.Op), "", "is for guest %s from %s", res.Guest, res.From)
	}
	held, others := false, 0
	kept, replaced := a.promises(from, r)
	for _, res := range kept {
		if res.Op == r.Op {
			held = true
		} else {
			others++
		}
	}
	if !held && !a.arriving(ctx, from, r) {
		what := fmt.Sprintf("cannot take guest %s from %s", r.Guest, from)
		if others >= a.cfg.Limits.MigrationsIn {
			return refuse(what, maint.Problemf(maint.CodeHostBusy, "host "+a.cfg.Host, "wait for one to end, or raise limits.migrations_in there",
				"already takes %d guests in, as many as limits.migrations_in allows", others))
		}
		problems, err := a.Check(ctx, from, r)
		if err != nil {
			return err
		}
		if err := maint.Refuse(what, problems); err != nil {
			return err
		}
	}
	now := time.Now()
	res := maint.Reservation{Op: r.Op, From: from, GuestUUID: r.GuestUUID, Guest: r.Guest,
		MemoryBytes: r.MemoryBytes, Pages: r.Pages, AntiAffinity: r.AntiAffinity, Disks: r.Disks, Expires: now.Add(reservationLife)}
	if held && len(replaced) == 0 {
		old, _ := a.journal.Reservation(r.Op)
		lately := old.Expires.Sub(now) > reservationLife-renewedLately
		old.Expires = res.Expires
		if lately && reflect.DeepEqual(old, res) {
			return nil
		}
	}
	if p := a.pace.refuse(a.cfg.Host, from); p != nil {
		return refuse(fmt.Sprintf("cannot take guest %s from %s", r.Guest, from), p)
	}
	data, err := json.Marshal(res)
	if err != nil {
		return err
	}
	var recs []maint.Record
	for _, old := range replaced {
		recs = append(recs, maint.Record{Op: old.Op, Kind: maint.RecReleased, By: from})
	}
	return a.append(append(recs, maint.Record{Op: r.Op, Kind: maint.RecReserved, By: from, Data: data})...)
}

// arriving reports whether the guest is on its way into room that was promised
// to it, but has lapsed: its source was not heard of for a while, and the copy
// went on. What it takes is taken anyway, and must be counted.
func (a *Agent) arriving(ctx context.Context, from string, r maint.Arrival) bool {
	res, ok := a.journal.Reservation(r.Op)
	if !ok || res.From != from || res.GuestUUID != r.GuestUUID {
		return false
	}
	g, err := a.hyp.Guest(ctx, r.GuestUUID)
	return err == nil && g.State.Active()
}

// Release gives up a reservation. One that is not held is no failure.
func (a *Agent) Release(ctx context.Context, from string, id maint.OpID) error {
	if res, ok := a.journal.Reservation(id); ok && res.From == from {
		a.endArrival(ctx, id, res.GuestUUID)
	}
	a.arrivals.Lock()
	defer a.arrivals.Unlock()
	for _, res := range a.journal.Reservations(time.Now()) {
		if res.Op != id {
			continue
		}
		if res.From != from {
			return maint.Problemf(maint.CodeForbidden, "reservation "+string(id), "", "is of %s", res.From)
		}
		return a.append(maint.Record{Op: id, Kind: maint.RecReleased, By: from})
	}
	return nil
}

// append makes records durable, or says what keeps it from doing so.
func (a *Agent) append(recs ...maint.Record) error {
	if err := a.journal.Append(recs...); err != nil {
		return maint.Problemf(maint.CodeJournal, "host "+a.cfg.Host,
			fmt.Sprintf("make room in, and writable, the state folder %s there", a.cfg.StateDir), "%v", err)
	}
	return nil
}

// View tells what this host has of a guest now.
func (a *Agent) View(ctx context.Context, uuid string) (maint.View, error) {
	v := maint.View{Host: a.cfg.Host}
	for _, came := range a.journal.Arrivals() {
		if came.GuestUUID == uuid {
			v.Came = append(v.Came, came.Op)
		}
	}
	g, err := a.hyp.Guest(ctx, uuid)
	v.Vigil = a.vigil.of(uuid) // after the look: it may have run, and gone, before that
	switch {
	case errors.Is(err, maint.ErrNoGuest):
		return v, nil
	case err != nil:
		return v, a.downProblem(err)
	}
	v.Guest = &g
	return v, nil
}

// Connections has those by which a guest comes outlive a cut network, or, in post-copy, ends
// them. It is for the peer that reserved room for this guest, and whose QEMU has, or had,
// their other ends.
func (a *Agent) Connections(ctx context.Context, from string, id maint.OpID, c maint.Connections) error {
	res, ok := a.journal.Reservation(id)
	if !ok || res.From != from {
		return maint.Problemf(maint.CodeForbidden, "reservation "+string(id), "", "%s holds none of that name here", from)
	}
	failed := func(format string, args ...any) error {
		return maint.Problemf(maint.CodeFailed, "guest "+res.Guest, "", format, args...)
	}
	g, err := a.hyp.Guest(ctx, res.GuestUUID)
	switch {
	case errors.Is(err, maint.ErrNoGuest) || err == nil && !migrate.Comes(g, c.End):
		return failed("does not come to %s at the moment", a.cfg.Host)
	case err != nil:
		return a.downProblem(err)
	case !c.End:
		n, err := a.hyp.HoldIn(ctx, res.GuestUUID, c.All)
		if err == nil && n < len(c.All) {
			err = failed("has %d of %d connections on %s", n, len(c.All), a.cfg.Host)
		}
		return err
	}
	n, err := a.hyp.Sever(ctx, res.GuestUUID, c.All)
	if err == nil {
		a.log.Warn("ended the connections by which a guest comes in post-copy, since their other ends are gone", "op", id, "guest", res.Guest, "peer", from, "connections", n)
	}
	return err
}

// Settle keeps an arrived guest as its source kept it. It is for the peer that
// reserved room for this guest, and for nothing but that guest.
func (a *Agent) Settle(ctx context.Context, from string, s maint.Settlement) error {
	if res, ok := a.journal.Reservation(s.Op); !ok || res.From != from || res.GuestUUID != s.GuestUUID {
		return maint.Problemf(maint.CodeForbidden, "guest "+s.GuestUUID, "", "%s holds no reservation %s for it here", from, s.Op)
	}
	g, err := a.hyp.Guest(ctx, s.GuestUUID)
	if err != nil {
		return a.downProblem(err)
	}
	if err := a.keepDisks(s.Op); err != nil {
		return err
	}
	if s.Persistent && !g.Persistent && s.XML != "" {
		if !defines(s.XML, s.GuestUUID) {
			return maint.Problemf(maint.CodeBadRequest, "guest "+g.Name, "", "the definition sent along is not its own")
		}
		a.log.Warn("an arrived guest has no definition, defining it", "guest", g.Name, "from", from)
		if err := a.hyp.Define(ctx, s.XML); err != nil {
			return err
		}
		g.Persistent = true
	}
	var kept error
	if g.Persistent && g.Autostart != s.Autostart {
		kept = a.hyp.SetAutostart(ctx, s.GuestUUID, s.Autostart)
	}
	// How it is kept depends neither on the journal nor on its events.
	return errors.Join(kept, a.arrived(ctx, s.Op, from, g), a.adopt(ctx, s))
}

// defines reports whether xml is a definition of that guest and no other. A
// second uuid, or one in a namespace, is not what libvirt would read.
func defines(definition, uuid string) bool {
	var d struct {
		XMLName xml.Name
		UUIDs   []struct {
			XMLName xml.Name
			Text    string `xml:",chardata"`
		} `xml:"uuid"`
	}
	return xml.Unmarshal([]byte(definition), &d) == nil && d.XMLName == xml.Name{Local: "domain"} &&
		len(d.UUIDs) == 1 && d.UUIDs[0].XMLName.Space == "" && d.UUIDs[0].Text == uuid
}

// CompletedJob returns the statistics of a guest's arrival.
func (a *Agent) CompletedJob(ctx context.Context, uuid string) (maint.Job, error) {
	j, err := a.hyp.CompletedJob(ctx, uuid)
	_, j.Started = a.cpus.of(uuid)
	return j, a.downProblem(err)
}
