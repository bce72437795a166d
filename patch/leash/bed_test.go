package leash

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"belay/agent/maint"
)

const (
	a, b, c = "aaaaaaaa-0000-0000-0000-000000000000", "bbbbbbbb-0000-0000-0000-000000000000", "cccccccc-0000-0000-0000-000000000000"
	testOp  = maint.OpID("hold-1")
)

// bed is a leash in a bubble of synctest, and its holder.
type bed struct {
	t    *testing.T
	w    *world
	dir  string
	boot string
	ctx  context.Context // the leash's: its end is a SIGTERM
	stop context.CancelFunc

	epoch  time.Time
	asleep atomic.Int64 // ns for which the host was suspended

	kills      int // of libvirt
	unkillable error

	k     *Keeper
	conns chan net.Conn
	ended chan error
	conn  net.Conn
	in    *lines
	ids   uint64
}

// within runs a test in a bubble, with a leash.
func within(t *testing.T, w *world, test func(b *bed)) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		b := &bed{t: t, w: w, dir: dir, boot: "boot-1", epoch: time.Now()}
		b.start()
		test(b)
		b.die()
	})
}

func (b *bed) clock() time.Duration {
	return time.Since(b.epoch) + time.Duration(b.asleep.Load()) + time.Hour
}

// start starts a leash. Accept and Close are those of a listener.
func (b *bed) start() {
	b.t.Helper()
	k, err := NewKeeper(Config{Dir: b.dir, Op: testOp, Boot: b.boot, Host: b.w, Monitor: b.w.dialMonitor,
		Find: func(g Guest) (string, error) { return "mon-" + g.UUID, nil },
		KillLibvirt: func() error {
			b.kills++
			if b.unkillable == nil {
				b.w.become("dead")
			}
			return b.unkillable
		},
		Clock: b.clock, Keep: time.Minute, Log: slog.New(slog.NewTextHandler(b.t.Output(), nil))})
	if err != nil {
		b.t.Fatal(err)
	}
	l := &pipes{conns: make(chan net.Conn), closed: make(chan struct{})}
	b.k, b.conns, b.ended = k, l.conns, make(chan error, 1)
	b.ctx, b.stop = context.WithCancel(context.Background())
	ended := b.ended
	go func() { ended <- k.Run(b.ctx, l) }()
	b.connect()
}

// kill ends the leash as SIGKILL would: it does nothing more.
func (b *bed) kill() {
	b.conn.Close()
	b.k.once.Do(func() { close(b.k.over) })
	<-b.ended
}

// die ends a leash that still runs when a test is over.
func (b *bed) die() {
	select {
	case <-b.ended:
		b.conn.Close()
	default:
		b.kill()
	}
	b.stop()
}

type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}
func (p *pipes) Close() error   { p.once.Do(func() { close(p.closed) }); return nil }
func (p *pipes) Addr() net.Addr { return nil }

func (b *bed) connect() {
	var theirs net.Conn
	b.conn, theirs = net.Pipe()
	b.in = newLines(b.conn, maxReply)
	b.conns <- theirs
}

// ask makes one request.
func (b *bed) ask(r request) reply {
	b.t.Helper()
	b.ids++
	r.ID = b.ids
	var answer reply
	if _, err := b.conn.Write(encode(r)); err != nil {
		b.t.Fatal(err)
	}
	if err := b.in.next(&answer); err != nil {
		b.t.Fatal(err)
	}
	if answer.ID != r.ID {
		b.t.Fatalf("answer %d to request %d", answer.ID, r.ID)
	}
	return answer
}

// order is one for all guests of the world, for a minute.
func (b *bed) order() *Status {
	s := &Status{Op: testOp, Boot: b.boot, Deadline: b.clock() + time.Minute, Silence: 3 * time.Second}
	for _, u := range []string{a, "bbbbbbbb-0000-0000-0000-000000000000", "cccccccc-0000-0000-0000-000000000000"} {
		if b.w.guests[u] != nil {
			s.Guests = append(s.Guests, GuestStatus{Guest: Guest{UUID: u, Name: "guest-" + u[:1], ID: 1}, Fate: Armed})
		}
	}
	return s
}

func (b *bed) arm() *Status {
	b.t.Helper()
	return b.must(request{Do: doArm, Order: b.order()}).Status
}

func (b *bed) must(r request) reply {
	b.t.Helper()
	answer := b.ask(r)
	if answer.Problem != nil {
		b.t.Fatalf("%s is refused: %v", r.Do, answer.Problem)
	}
	return answer
}

// pause is what belayd does: it stops guests and says so.
func (b *bed) pause(uuids ...string) {
	b.t.Helper()
	for _, u := range uuids {
		b.w.pause(u)
	}
	b.must(request{Do: doPaused, Guests: uuids})
}

// renewFor renews every second.
func (b *bed) renewFor(d time.Duration) {
	b.t.Helper()
	for range d / time.Second {
		time.Sleep(time.Second)
		b.must(request{Do: doRenew})
	}
}

// runsWithin waits until the guest runs, as its QEMU has it, and gives how long
// that took.
func (b *bed) runsWithin(d time.Duration, uuid string) time.Duration {
	b.t.Helper()
	begun := time.Now()
	for b.w.get(uuid).qemu != "running" {
		if time.Since(begun) > d {
			b.t.Fatalf("after %s guest %s is %+v", d, uuid[:1], b.w.get(uuid))
		}
		time.Sleep(10 * time.Millisecond)
	}
	return time.Since(begun)
}

// staysFor checks all the while that the guest is not started.
func (b *bed) staysFor(d time.Duration, uuid string) {
	b.t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if m := b.w.get(uuid); m.qemu == "running" || m.conts > 0 {
			b.t.Fatalf("guest %s was started: %+v", uuid[:1], m)
		}
	}
}

// notes are what the leash has written down.
func (b *bed) notes() *Status {
	b.t.Helper()
	s, err := readNotes(b.dir, testOp)
	if err != nil {
		b.t.Fatal(err)
	}
	return s
}

func (b *bed) noNotes() {
	b.t.Helper()
	if _, err := readNotes(b.dir, testOp); !errors.Is(err, fs.ErrNotExist) {
		b.t.Fatalf("there are notes: %v", err)
	}
}

// fate checks what the leash's notes say of a guest.
func (b *bed) fate(uuid string, want Fate) GuestStatus {
	b.t.Helper()
	synctest.Wait()
	g := b.notes().guest(uuid)
	if g.Fate != want {
		b.t.Fatalf("guest %s is %s (%s), want %s", uuid[:1], g.Fate, g.Text, want)
	}
	return *g
}

// events counts the events of a kind about a guest, "" for those about none.
func (b *bed) events(kind, uuid string) (n int, last maint.LeashEvent) {
	b.t.Helper()
	synctest.Wait()
	for _, e := range b.notes().Events {
		if e.Kind == kind && e.UUID == uuid {
			n, last = n+1, e
		}
	}
	return n, last
}

// returned waits for the leash's end.
func (b *bed) returned(d time.Duration) {
	b.t.Helper()
	select {
	case err := <-b.ended:
		if err != nil {
			b.t.Fatal(err)
		}
		b.ended <- nil
	case <-time.After(d):
		b.t.Fatal("the leash does not end")
	}
}
