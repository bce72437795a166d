package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"belay/agent/maint"
	"belay/hypervisor"
	"belay/migrate"
	"belay/migrate/local"
)

// Disks that are not shared are copied by libvirt into files that the destination has made
// before. What it makes is in its journal before it is there, and is removed again on the
// word of the source alone, which has seen that the guest did not move: by RemoveDisks, or
// when the source is asked (MoveEnd). Silence is no such word: a guest whose source is
// gone may run, or have run, on these files.
//
//	reserved ──► making ──► made ──► the guest has settled: kept
//	                │         └────► the source says that it has not moved: gone
//	                └──────────────► the same

// WrittenDisks implements migrate.DiskSource.
func (s source) WrittenDisks(ctx context.Context, uuid string) ([]maint.GuestDisk, error) {
	x, err := s.GuestXML(ctx, uuid)
	if err != nil {
		return nil, err
	}
	disks, err := hypervisor.ParseDisks(x.Live)
	if err != nil {
		return nil, err
	}
	for i := range disks {
		d := &disks[i]
		if d.Why != "" {
			continue
		}
		if d.Bytes, d.Allocated, err = s.DiskSize(ctx, uuid, d.Target); err != nil {
			return nil, err
		}
	}
	return disks, nil
}

// CheckFiles tells which files are the same storage here as at who asks.
func (a *Agent) CheckFiles(ctx context.Context, q maint.FilesQuestion) ([]maint.FileView, error) {
	if err := q.Validate(); err != nil {
		return nil, err
	}
	ground := a.local.Look(ctx, maint.Needs{Files: q.Files})
	views := []maint.FileView{}
	for _, f := range q.Files {
		views = append(views, maint.FileView{Path: f.Path, Same: migrate.SameFile(f, ground.Files[f.Path])})
	}
	return views, nil
}

// checkDisks lists why disks cannot be copied to here.
func (a *Agent) checkDisks(ctx context.Context, r maint.Arrival) []maint.Problem {
	if len(r.Disks) == 0 {
		return nil
	}
	c := migrate.DiskChecks{Host: a.cfg.Host, Places: a.local.Places(ctx, r.Disks), Claims: a.claims(ctx, r), QemuImg: a.local.QemuImg(),
		InTheWay: func(path string) (string, string) { return a.inTheWay(ctx, r, path) }}
	ps := migrate.CheckDisks(r.Disks, c)
	for _, d := range r.Disks {
		for _, folder := range append([]string{a.cfg.StateDir, a.cfg.RunDir}, notForDisks...) {
			if folder != "" && (strings.HasPrefix(d.Path, folder+"/") || strings.HasPrefix(c.Places[d.Path].Real+"/", folder+"/")) {
				ps = append(ps, *maint.Problemf(maint.CodeDiskCopy, "host "+a.cfg.Host, "move the disk elsewhere first (virsh blockcopy)",
					"takes no disks in %s, where disk %s (%s) is to be copied to", folder, d.Target, d.Path))
			}
		}
	}
	return ps
}

// notForDisks are folders of the system that no peer has anything made in, by whatever
// name it asks.
var notForDisks = []string{"/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/root", "/run", "/sbin", "/sys", "/usr", "/var/spool"}

// claims are what other arrivals have been promised of this host's storage, less what
// their disks take already. Those whose files are made are copied on also when their
// reservation has lapsed. What was promised to the same guest before is promised no more.
func (a *Agent) claims(ctx context.Context, r maint.Arrival) migrate.Claims {
	promised := make(map[maint.OpID][]maint.DiskCopy)
	for _, res := range a.journal.Reservations(time.Now()) {
		if res.GuestUUID != r.GuestUUID {
			promised[res.Op] = res.Disks
		}
	}
	for _, made := range a.journal.Disks() {
		promised[made.Op] = nil
		for _, f := range made.Files {
			promised[made.Op] = append(promised[made.Op], f.DiskCopy)
		}
	}
	delete(promised, r.Op)
	claims := make(migrate.Claims)
	for _, disks := range promised {
		places := a.local.Places(ctx, disks)
		for _, d := range disks {
			p := places[d.Path]
			claims[p.Storage] += d.Room() - min(d.Room(), p.Taken)
		}
	}
	return claims
}

// inTheWay says what is known of what is at the path of a disk that is to be copied.
func (a *Agent) inTheWay(ctx context.Context, r maint.Arrival, path string) (what, remedy string) {
	for _, made := range a.journal.Disks() {
		for _, f := range made.Files {
			switch {
			case f.Path != path || !a.local.IsMade(ctx, f):
			case made.Op == r.Op:
				return "", ""
			default:
				return fmt.Sprintf("it was made for guest %s from %s (operation %s)", made.Guest, made.From, made.Op),
					"wait for that operation to end; 'belay status' there says what is left of it"
			}
		}
	}
	guests, err := a.hyp.Guests(ctx)
	if err != nil {
		return "whose it is cannot be found out without libvirt", "see that it runs there"
	}
	for _, g := range guests {
		if uses(g, path) {
			return "guest " + g.Name + " has it as a disk there", "give one of the two another path (virsh blockcopy, under the running guest)"
		}
	}
	for _, op := range slices.Backward(a.journal.Ops()) {
		if op.Move != nil && slices.ContainsFunc(op.Move.Disks, func(d maint.DiskCopy) bool { return d.Path == path }) {
			return fmt.Sprintf("operation %s left it when it moved guest %s to %s at %s", op.ID, op.Guest, op.Move.To, op.Ended.Format(time.RFC3339)),
				fmt.Sprintf("if it has not been used since, and no other image has it as its backing file (qemu-img info --backing-chain), it is of no more use: rm %s, there", maint.ShellWord(path))
		}
	}
	return "Belay never overwrites a file", "move it away, or remove it if nothing needs it"
}

// MakeDisks makes what the disks of a guest on its way are copied into, anew if it has been
// made before. It is for the peer that holds the reservation.
func (a *Agent) MakeDisks(ctx context.Context, from string, id maint.OpID) error {
	defer a.storage.lock(id)()
	if err := ctx.Err(); err != nil { // who asked does not wait any more, and may have asked again
		return err
	}
	res, ok := a.journal.Reservation(id)
	if !ok || res.From != from || !res.Expires.After(time.Now()) {
		return maint.Problemf(maint.CodeForbidden, "disks of "+string(id), "reserve first", "%s holds no reservation %s here", from, id)
	}
	if old, ok := a.openDisks(id); ok {
		if err := a.removeDisks(ctx, old); err != nil {
			return err
		}
	}
	if p := a.pace.refuse(a.cfg.Host, from); p != nil {
		return refuse(fmt.Sprintf("cannot take the disks of guest %s from %s", res.Guest, from), p)
	}
	arrival := maint.Arrival{Op: id, Guest: res.Guest, GuestUUID: res.GuestUUID, Disks: res.Disks}
	if err := maint.Refuse(fmt.Sprintf("cannot take the disks of guest %s from %s", res.Guest, from), a.checkDisks(ctx, arrival)); err != nil {
		return err
	}
	made := maint.MadeDisks{Op: id, From: from, Guest: res.Guest, GuestUUID: res.GuestUUID, State: maint.DisksMaking}
	for _, d := range res.Disks {
		made.Files = append(made.Files, local.PlanDisk(d))
	}
	if err := a.recordDisks(made); err != nil {
		return err
	}
	err := a.makeDisks(ctx, &made)
	if err == nil {
		return nil
	}
	// What of it cannot be removed now is looked for again; the error is the first one.
	if err := a.removeDisks(context.WithoutCancel(ctx), made); err != nil {
		a.log.Error("what was made for disks cannot be removed", "op", id, "guest", made.Guest, "err", err)
	}
	code := maint.CodeDiskCopy
	if errors.Is(err, local.ErrInTheWay) {
		code = maint.CodeDiskInTheWay
	}
	return maint.AsProblem(err, code, "host "+a.cfg.Host)
}

// makeDisks makes the files, writes down which they are, and puts them in their places.
func (a *Agent) makeDisks(ctx context.Context, made *maint.MadeDisks) (err error) {
	for i, f := range made.Files {
		if made.Files[i], err = a.local.MakeDisk(ctx, f); err != nil {
			return err
		}
	}
	made.State = maint.DisksMade
	if err := a.recordDisks(*made); err != nil {
		return err
	}
	for _, f := range made.Files {
		if err := a.local.PlaceDisk(ctx, f); err != nil {
			return err
		}
	}
	a.log.Info("files for a guest's disks are made", "op", made.Op, "guest", made.Guest, "from", made.From, "files", len(made.Files))
	return nil
}

// RemoveDisks removes what was made for a guest's disks. It is the word of the source
// that the guest has not moved.
func (a *Agent) RemoveDisks(ctx context.Context, from string, id maint.OpID) error {
	defer a.storage.lock(id)()
	made, ok := a.openDisks(id)
	if !ok {
		return nil
	}
	if made.From != from {
		return maint.Problemf(maint.CodeForbidden, "disks of "+string(id), "", "were made for %s", made.From)
	}
	return a.removeDisks(ctx, made)
}

// openDisks are the files that were made for an operation, while it is still to be seen
// what becomes of them.
func (a *Agent) openDisks(id maint.OpID) (maint.MadeDisks, bool) {
	for _, m := range a.journal.Disks() {
		if m.Op == id {
			return m, true
		}
	}
	return maint.MadeDisks{}, false
}

// removeDisks removes files that were made, unless their guest has come, or a guest of this
// host has one of them as a disk: then nothing is removed. The operation's a.storage is held.
func (a *Agent) removeDisks(ctx context.Context, made maint.MadeDisks) error {
	if _, came := a.journal.Arrival(made.Op); came {
		a.log.Warn("a guest has run on the disks that were made for it, although its source says that it has not moved: they are left", "op", made.Op, "guest", made.Guest)
		made.State = maint.DisksKept
		return a.recordDisks(made)
	}
	guests, err := a.hyp.Guests(ctx)
	if err != nil {
		return a.downProblem(err)
	}
	for _, g := range guests {
		if !slices.ContainsFunc(made.Files, func(f maint.MadeFile) bool { return uses(g, f.Path) }) {
			continue
		}
		arriving := g.State == maint.GuestPaused && (g.Job == "migration in" || g.Reason == "migrating")
		if arriving { // libvirt is about to end it
			return maint.Problemf(maint.CodeBusy, "guest "+g.Name, "wait until it has gone from there (virsh domstate --reason)",
				"is still arriving on %s with the disks of operation %s", a.cfg.Host, made.Op)
		}
		a.log.Warn("a guest has the disks that were made for it, although its source says that it has not moved: they are left", "op", made.Op, "guest", g.Name, "state", g.State)
		made.State = maint.DisksKept
		return a.recordDisks(made)
	}
	var failed []error
	for _, f := range made.Files {
		if err := a.local.RemoveDisk(ctx, f); err != nil {
			failed = append(failed, err)
		}
	}
	if err := errors.Join(failed...); err != nil {
		return maint.AsProblem(err, maint.CodeLeftover, "host "+a.cfg.Host)
	}
	made.State = maint.DisksGone
	if err := a.recordDisks(made); err != nil {
		return err
	}
	a.log.Info("files for a guest's disks are removed", "op", made.Op, "guest", made.Guest, "from", made.From)
	return nil
}

// uses reports whether a guest has a file as a disk.
func uses(g maint.Guest, path string) bool {
	return slices.ContainsFunc(g.Disks, func(d maint.Disk) bool { return d.Source == path })
}

// keepDisks is for a guest that has moved: its disks are its own.
func (a *Agent) keepDisks(id maint.OpID) error {
	defer a.storage.lock(id)()
	made, ok := a.openDisks(id)
	if !ok {
		return nil
	}
	made.State = maint.DisksKept
	return a.recordDisks(made)
}

func (a *Agent) recordDisks(made maint.MadeDisks) error {
	data, err := json.Marshal(made)
	if err != nil {
		return err
	}
	return a.append(maint.Record{Op: made.Op, Kind: maint.RecDisks, By: made.From, Data: data})
}

// MoveEnd tells a peer how an operation ended that was to move a guest to it.
func (a *Agent) MoveEnd(_ context.Context, from string, id maint.OpID) (maint.MoveEnd, error) {
	op, ok := a.journal.Op(id)
	if !ok || op.Kind != maint.OpMigrate {
		return maint.MoveUnknown, nil
	}
	if p := a.peers[op.Peer]; p == nil || p.cfg.CertName != from {
		return maint.MoveUnknown, maint.Problemf(maint.CodeForbidden, "operation "+string(id), "", "is not about %s", from)
	}
	switch {
	case op.State != maint.OpEnded:
		return maint.MoveOpen, nil
	case op.Outcome.TookEffect():
		return maint.MoveDone, nil
	case op.Outcome == maint.OutcomeStuck:
		return maint.MoveUnknown, nil
	}
	return maint.MoveNot, nil
}

// disksEvery is how often sources are asked what became of guests whose disks were made
// here.
const disksEvery = 30 * time.Second

// followDisks finds out what became of guests for whose disks files were made, where
// nobody has said so.
func (a *Agent) followDisks(ctx context.Context) {
	tick := time.NewTicker(disksEvery)
	defer tick.Stop()
	for {
		for _, made := range a.journal.Disks() {
			if err := a.clearDisks(ctx, made); err != nil && ctx.Err() == nil {
				a.log.Warn("what becomes of files that were made for disks is not known yet", "op", made.Op, "guest", made.Guest, "from", made.From, "err", err)
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// clearDisks asks the source what became of a guest, and keeps or removes its files.
func (a *Agent) clearDisks(ctx context.Context, made maint.MadeDisks) error {
	var source *peer
	for _, p := range a.peers {
		if p.cfg.CertName == made.From {
			source = p
		}
	}
	if source == nil {
		return a.unknownPeer(made.From)
	}
	ctx, cancel := context.WithTimeout(ctx, greetTimeout)
	defer cancel()
	end, err := source.client.MoveEnd(ctx, made.Op)
	if err != nil {
		return err
	}
	switch end {
	case maint.MoveDone:
		return a.keepDisks(made.Op)
	case maint.MoveNot:
		return a.RemoveDisks(ctx, made.From, made.Op)
	case maint.MoveUnknown:
		return maint.Problemf(maint.CodeUnverified, "operation "+string(made.Op), "", "%s does not know whether the guest has moved", made.From)
	}
	return nil
}

// strayDisks are the conditions of files that were made for disks and whose operation has
// no reservation any more: nobody has said what becomes of them.
func (a *Agent) strayDisks() (cs []maint.Condition) {
	for _, made := range a.journal.Disks() {
		if res, ok := a.journal.Reservation(made.Op); ok && res.Expires.After(time.Now()) {
			continue
		}
		for _, f := range made.Files {
			cs = append(cs, maint.Condition{Code: maint.CodeLeftover,
				Text:   fmt.Sprintf("%s was made for disk %s of guest %s (operation %s), and %s has not said what became of it", f.Path, f.Target, made.Guest, made.Op, made.From),
				Remedy: fmt.Sprintf("have belayd answer on %s; else find out where the guest runs, and if it never ran here: rm %s", made.From, maint.ShellWord(f.Path))})
		}
	}
	return cs
}

// locks are a lock for each operation: one whose storage hangs holds nobody else up. The zero
// value is ready.
type locks struct {
	mu   sync.Mutex
	held map[maint.OpID]*heldLock
}

// heldLock is a lock that some hold or wait for.
type heldLock struct {
	sync.Mutex
	users int
}

// lock waits for an operation's lock, and gives what unlocks it.
func (l *locks) lock(id maint.OpID) (unlock func()) {
	l.mu.Lock()
	if l.held == nil {
		l.held = make(map[maint.OpID]*heldLock)
	}
	h := l.held[id]
	if h == nil {
		h = &heldLock{}
		l.held[id] = h
	}
	h.users++
	l.mu.Unlock()
	h.Lock()
	return func() {
		h.Unlock()
		l.mu.Lock()
		defer l.mu.Unlock()
		if h.users--; h.users == 0 {
			delete(l.held, id)
		}
	}
}
