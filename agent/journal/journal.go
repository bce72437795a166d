package journal

import (
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"belay/agent/maint"
)

// fileName is the journal's file inside the state folder.
const fileName = "journal.db"

var bucket = []byte("records")

// Journal is an open journal. Its methods may be called concurrently.
type Journal struct {
	db   *bbolt.DB
	path string

	mu        sync.Mutex
	ops       map[maint.OpID]*maint.Op
	reserved  map[maint.OpID]maint.Reservation
	arrived   map[maint.OpID]maint.Arrived
	disks     map[maint.OpID]maint.MadeDisks // of which it is to be seen what becomes of them
	scheduled maint.Scheduled
	cordon    *maint.Cordon // nil: the host takes guests in
	patches   maint.Patches
	last      uint64
	changed   chan struct{} // closed and replaced at every append
	failed    error         // the last append's error, nil when it worked
}

// Open opens or creates the journal in the state folder dir and folds its
// records. The file is locked: a second belayd on the same folder is refused
// after a second.
func Open(dir string) (*Journal, error) {
	path := filepath.Join(dir, fileName)
	refuse := func(err error, remedy string) error {
		return fmt.Errorf("cannot open the journal %s: %w (%s)", path, err, remedy)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, refuse(err, "make the state folder writable for belayd, or set state_dir to one that is")
	}
	db, err := openFile(path)
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return nil, refuse(errors.New("it is locked"), "another belayd uses this state folder; stop it, or set another state_dir")
	case errors.Is(err, bolterrors.ErrInvalid), errors.Is(err, bolterrors.ErrChecksum), errors.Is(err, bolterrors.ErrVersionMismatch), errors.Is(err, errDamaged):
		return nil, refuse(err, "the file is damaged; move it away to start with an empty history, after checking that no migration is running (virsh list; virsh domjobinfo)")
	case err != nil:
		return nil, refuse(err, "make the state folder writable and give it room")
	}
	j := &Journal{db: db, path: path,
		ops:       make(map[maint.OpID]*maint.Op),
		reserved:  make(map[maint.OpID]maint.Reservation),
		arrived:   make(map[maint.OpID]maint.Arrived),
		disks:     make(map[maint.OpID]maint.MadeDisks),
		scheduled: maint.NewScheduled(),
		changed:   make(chan struct{})}
	if err := j.load(); err != nil {
		db.Close()
		return nil, refuse(err, "the file is damaged or was written by a newer belayd; move it away to start with an empty history")
	}
	return j, nil
}

// errDamaged: the file is a journal, but not all of it can be read.
var errDamaged = errors.New("it is damaged")

// openFile opens the file for writing, after a look through all of it. bbolt
// panics on a damaged page, at opening even in a goroutine of its own, and
// beyond the end of a truncated file the kernel raises a fault: neither tells
// an operator what to do.
func openFile(path string) (*bbolt.DB, error) {
	o := bbolt.Options{Timeout: time.Second, NoFreelistSync: true}
	if f, err := os.Stat(path); err == nil && f.Mode().IsRegular() && f.Size() > 0 {
		look := o
		look.ReadOnly = true
		if err := intact(func() error { return lookThrough(path, &look) }); err != nil {
			return nil, err
		}
	}
	var db *bbolt.DB
	err := intact(func() (err error) {
		db, err = bbolt.Open(path, 0o600, &o)
		return err
	})
	return db, err
}

// intact turns a panic of f, also one on memory that cannot be read, into
// errDamaged.
func intact(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", errDamaged, p)
		}
	}()
	return f()
}

// lookThrough reads all of the file.
func lookThrough(path string, o *bbolt.Options) error {
	db, err := bbolt.Open(path, 0o600, o)
	if err != nil {
		return err
	}
	defer db.Close()
	return db.View(func(tx *bbolt.Tx) error {
		if f, err := os.Stat(path); err != nil {
			return err
		} else if f.Size() < tx.Size() {
			return fmt.Errorf("%w: it has %d bytes, and once had %d", errDamaged, f.Size(), tx.Size())
		}
		return tx.ForEach(func(_ []byte, b *bbolt.Bucket) error {
			return b.ForEach(func(_, v []byte) error {
				_ = crc32.ChecksumIEEE(v) // touch every byte
				return nil
			})
		})
	})
}

func (j *Journal) load() error {
	err := j.db.Update(func(tx *bbolt.Tx) error {
		_, err := tx.CreateBucketIfNotExists(bucket)
		return err
	})
	if err != nil {
		return err
	}
	return j.db.View(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucket)
		j.last = b.Sequence()
		return b.ForEach(func(k, v []byte) error {
			var r maint.Record
			if err := json.Unmarshal(v, &r); err != nil {
				return fmt.Errorf("record %x: %w", k, err)
			}
			return j.apply(r)
		})
	})
}

// Close releases the file.
func (j *Journal) Close() error { return j.db.Close() }

// legible refuses records of what does not belong to one operation, and that could not be
// read again.
func legible(r maint.Record) error {
	read := func(v any, what string) error {
		if err := json.Unmarshal(r.Data, v); err != nil {
			return fmt.Errorf("cannot read %s: %w", what, err)
		}
		return nil
	}
	switch r.Kind {
	case maint.RecEvent:
		return read(new(maint.EventChange), "a change of scheduled events")
	case maint.RecCordoned:
		return read(new(maint.Cordon), "a cordon")
	case maint.RecPatches:
		return read(new(maint.Patches), "what is kept of livepatches")
	case maint.RecArrived:
		return read(new(maint.Arrived), "an arrival")
	case maint.RecDisks:
		_, err := readDisks(r)
		return err
	}
	return nil
}

// Append makes records durable, in order and all or none: when it returns nil
// they are on disk. Seq and Time are set here. A record that Fold refuses is
// an error and nothing is written.
func (j *Journal) Append(recs ...maint.Record) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	now := time.Now().Round(0)
	// Fold on copies first: what is on disk must always fold.
	trial := make(map[maint.OpID]*maint.Op)
	for i := range recs {
		recs[i].Seq, recs[i].Time = j.last+uint64(i)+1, now
		if err := legible(recs[i]); err != nil {
			return err
		}
		if k := recs[i].Kind; k == maint.RecEvent || isReservation(k) || standing(k) != "" || k == maint.RecArrived || k == maint.RecDisks {
			continue
		}
		op := trial[recs[i].Op]
		if op == nil {
			op = new(maint.Op)
			if have := j.ops[recs[i].Op]; have != nil {
				*op = clone(have)
			}
			trial[recs[i].Op] = op
		}
		if err := Fold(op, recs[i]); err != nil {
			return err
		}
	}
	err := j.db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucket)
		for _, r := range recs {
			v, err := json.Marshal(r)
			if err != nil {
				return err
			}
			if err := b.Put(key(r.Seq), v); err != nil {
				return err
			}
		}
		return b.SetSequence(j.last + uint64(len(recs)))
	})
	if err != nil {
		j.failed = fmt.Errorf("cannot write the journal %s: %w", j.path, err)
		return j.failed
	}
	j.failed = nil
	j.last += uint64(len(recs))
	for _, r := range recs {
		if err := j.apply(r); err != nil {
			return err // cannot happen for an operation: it was folded above
		}
	}
	close(j.changed)
	j.changed = make(chan struct{})
	return nil
}

func isReservation(k maint.RecordKind) bool {
	return k == maint.RecReserved || k == maint.RecReleased
}

// standing names what a record says of the host itself, which holds until another record
// says something else; "": it is not of that kind.
func standing(k maint.RecordKind) string {
	switch k {
	case maint.RecCordoned, maint.RecUncordoned:
		return "cordon"
	case maint.RecPatches:
		return "patches"
	}
	return ""
}

// apply folds one durable record into the state. j.mu is held, or j is not
// shared yet.
func (j *Journal) apply(r maint.Record) error {
	switch r.Kind {
	case maint.RecReserved:
		var res maint.Reservation
		if err := json.Unmarshal(r.Data, &res); err != nil {
			return fmt.Errorf("reservation %s: %w", r.Op, err)
		}
		j.reserved[r.Op] = res
		return nil
	case maint.RecReleased:
		delete(j.reserved, r.Op)
		return nil
	case maint.RecArrived:
		var a maint.Arrived
		if err := json.Unmarshal(r.Data, &a); err != nil {
			return fmt.Errorf("arrival %s: %w", r.Op, err)
		}
		j.arrived[r.Op] = a
		return nil
	case maint.RecDisks:
		return j.foldDisks(r)
	case maint.RecEvent:
		return j.foldScheduled(r)
	case maint.RecCordoned:
		c := new(maint.Cordon)
		if err := json.Unmarshal(r.Data, c); err != nil {
			return fmt.Errorf("cordon of this host: %w", err)
		}
		j.cordon = c
		return nil
	case maint.RecUncordoned:
		j.cordon = nil
		return nil
	case maint.RecPatches:
		var p maint.Patches
		if err := json.Unmarshal(r.Data, &p); err != nil {
			return fmt.Errorf("livepatches of this host: %w", err)
		}
		j.patches = p
		return nil
	}
	op := j.ops[r.Op]
	if op == nil {
		op = new(maint.Op)
	}
	if err := Fold(op, r); err != nil {
		return err
	}
	j.ops[r.Op] = op
	return nil
}

// Op returns the present state of an operation.
func (j *Journal) Op(id maint.OpID) (maint.Op, bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	op := j.ops[id]
	if op == nil {
		return maint.Op{}, false
	}
	return clone(op), true
}

// Ops returns all operations, oldest first.
func (j *Journal) Ops() []maint.Op {
	j.mu.Lock()
	defer j.mu.Unlock()
	ops := make([]maint.Op, 0, len(j.ops))
	for _, op := range j.ops {
		ops = append(ops, clone(op))
	}
	slices.SortFunc(ops, func(a, b maint.Op) int {
		if c := a.Started.Compare(b.Started); c != 0 {
			return c
		}
		return cmp.Compare(a.ID, b.ID)
	})
	return ops
}

// Cordon returns why the host takes no guests in; nil: it does.
func (j *Journal) Cordon() *maint.Cordon {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.cordon // never changed
}

// Patches returns what is kept of livepatches.
func (j *Journal) Patches() maint.Patches {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.patches // what it points to is never changed
}

// Records returns the records of an operation, oldest first; of all when id
// is "".
func (j *Journal) Records(id maint.OpID) ([]maint.Record, error) {
	var recs []maint.Record
	err := j.db.View(func(tx *bbolt.Tx) error {
		return tx.Bucket(bucket).ForEach(func(_, v []byte) error {
			var r maint.Record
			if err := json.Unmarshal(v, &r); err != nil {
				return err
			}
			if id == "" || r.Op == id {
				recs = append(recs, r)
			}
			return nil
		})
	})
	return recs, err
}

// Changed returns a channel that is closed at the next append. Take it before
// reading the state that is to be watched.
func (j *Journal) Changed() <-chan struct{} {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.changed
}

// Health returns the error of the last append, nil when it worked.
func (j *Journal) Health() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.failed
}

// Prune deletes the records of operations and scheduled events that ended before t, but for
// parts of an operation that has not ended, of reservations that lapsed, of guests that came and of disks that were settled before t.
// It makes one record of those about
// scheduled events that are older than an hour: guests can cause many. It returns how
// many records went.
func (j *Journal) Prune(t time.Time) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	gone := make(map[maint.OpID]bool)
	for id, op := range j.ops {
		whole := j.ops[op.Part]
		if op.State == maint.OpEnded && op.Ended.Before(t) && (whole == nil || whole.State == maint.OpEnded) {
			gone[id] = true
		}
	}
	// The destination has no other record of a move than its reservation:
	// the live ones stay, of the others the records older than t go.
	last := make(map[string]uint64) // the one that says how it is now stays
	events := newCompaction(t, time.Now().Add(-eventsApart))
	stale := func(r maint.Record) bool {
		if isReservation(r.Kind) {
			res, held := j.reserved[r.Op]
			return r.Time.Before(t) && (!held || res.Expires.Before(t))
		}
		if r.Kind == maint.RecArrived {
			return j.arrived[r.Op].At.Before(t)
		}
		if r.Kind == maint.RecDisks {
			_, open := j.disks[r.Op]
			return r.Time.Before(t) && !open
		}
		return gone[r.Op]
	}
	n := 0
	err := j.db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucket)
		var keys [][]byte // deleting under a cursor makes it skip
		old := make(map[uint64]string)
		err := b.ForEach(func(k, v []byte) error {
			var r maint.Record
			if err := json.Unmarshal(v, &r); err != nil {
				return err
			}
			if r.Kind == maint.RecEvent {
				return events.add(r)
			}
			switch {
			case standing(r.Kind) != "":
				if r.Time.Before(t) {
					old[r.Seq] = standing(r.Kind)
				}
				last[standing(r.Kind)] = r.Seq
			case stale(r):
				keys = append(keys, slices.Clone(k))
			}
			return nil
		})
		if err != nil {
			return err
		}
		for seq, of := range old {
			if seq != last[of] {
				keys = append(keys, key(seq))
			}
		}
		for _, seq := range events.old {
			keys = append(keys, key(seq))
		}
		inPlace, there, err := events.record()
		if err != nil {
			return err
		}
		for _, k := range keys {
			if err := b.Delete(k); err != nil {
				return err
			}
		}
		n = len(keys)
		if there {
			n--
			v, err := json.Marshal(inPlace)
			if err != nil {
				return err
			}
			return b.Put(key(inPlace.Seq), v)
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("cannot prune the journal %s: %w", j.path, err)
	}
	for id := range gone {
		delete(j.ops, id)
	}
	j.scheduled.Forget(t)
	for id, res := range j.reserved {
		if res.Expires.Before(t) {
			delete(j.reserved, id)
		}
	}
	maps.DeleteFunc(j.arrived, func(_ maint.OpID, a maint.Arrived) bool { return a.At.Before(t) })
	return n, nil
}

func key(seq uint64) []byte { return binary.BigEndian.AppendUint64(nil, seq) }

// clone copies what callers could change or a later Fold would.
func clone(op *maint.Op) maint.Op {
	c := *op
	c.Steps = slices.Clone(op.Steps)
	for i := range c.Steps {
		c.Steps[i].Notes = slices.Clone(c.Steps[i].Notes)
	}
	c.Problems = slices.Clone(op.Problems)
	return c
}
