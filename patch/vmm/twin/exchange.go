package twin

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"belay/agent/maint"
)

// inPause is how often a QEMU is asked while the guest stands still.
const inPause = time.Millisecond

// warm starts the second QEMU, with the guest's memory, waiting.
func (x *exchange) warm(ctx context.Context) error {
	ask, cancel := context.WithTimeout(ctx, x.paced().ask)
	defer cancel()
	g, err := x.from.Guest(ask, x.UUID)
	if err != nil {
		return err
	}
	files, err := x.files(ask, x.from, g.MemoryBytes)
	if err != nil {
		return err
	}
	d, err := x.from.Describe(ask, x.UUID)
	if err != nil {
		return err
	}
	token := rand.Text()
	text, err := incomingXML(d.Portable, token)
	if err != nil {
		return err
	}
	if err := x.Twin.Lend(x.UUID, !x.out, token, files); err != nil {
		return err
	}
	start, cancelStart := context.WithTimeout(ctx, x.paced().settle)
	defer cancelStart()
	return x.to.CreatePaused(start, text)
}

// files are the memory files of one side's QEMU.
func (x *exchange) files(ctx context.Context, side Side, memory uint64) ([]string, error) {
	files, problems, err := memoryFiles(ctx, side, x.UUID, x.Guest, memory)
	if err == nil && len(problems) > 0 {
		err = &problems[0]
	}
	return files, err
}

// hand sends the guest from the first QEMU to the second, which waits for it, and
// has it run there. Whatever goes wrong is seen at the next look. Once the guest
// stands still detach's end does not end it, nobody would resume the guest; it is
// bounded.
func (x *exchange) hand(ctx, detach context.Context) error {
	ready, cancel := context.WithTimeout(ctx, x.paced().settle)
	defer cancel()
	if err := x.ready(ready); err != nil {
		x.fail("its second QEMU is not ready: %v", err)
		return nil
	}
	if x.BeforePause != nil {
		if err := x.BeforePause(ready, x.out); err != nil {
			x.fail("it is not to be paused: %v", err)
			return nil
		}
	}
	if detach.Err() != nil {
		return nil
	}
	detach = context.WithoutCancel(detach)
	send, cancelSend := context.WithTimeout(detach, x.paced().migrate)
	defer cancelSend()
	if _, err := x.from.QMP(send, x.UUID, "migrate", x.uri()); err != nil {
		x.fail("its first QEMU does not send it: %v", err)
		return nil
	}
	for {
		m, err := migration(send, x.from, x.UUID)
		if err != nil {
			return nil
		}
		if !m.active() {
			if m.Status != "completed" {
				x.fail("its first QEMU could not send it (%s): %s", m.Status, m.Error)
				return nil
			}
			x.sentAt, x.stood = time.Now(), time.Duration(m.Downtime)*time.Millisecond
			break
		}
		if !wait(send, inPause) {
			return nil
		}
	}
	for {
		status, err := runState(send, x.to, x.UUID)
		switch {
		case err != nil:
			return nil
		case status == "paused":
			return x.forward(detach, sent)
		case status != "inmigrate" || !wait(send, inPause):
			return nil
		}
	}
}

func (x *exchange) uri() map[string]any {
	return map[string]any{"uri": "unix:" + x.Twin.Incoming(x.UUID)}
}

// ready makes sure that the second QEMU maps the guest's memory and listens.
func (x *exchange) ready(ctx context.Context) error {
	var files [2][]string
	for i, side := range []Side{x.from, x.to} {
		var err error
		if files[i], err = x.files(ctx, side, 1); err != nil {
			return err
		}
		if err := ignoreShared(ctx, side, x.UUID, true); err != nil {
			return err
		}
	}
	same, err := sameFiles(files[0], files[1])
	if err != nil {
		return err
	}
	if !same {
		return errors.New("it does not map the guest's memory: Belay's hook has not run")
	}
	_, err = x.to.QMP(ctx, x.UUID, "migrate-incoming", x.uri())
	return err
}

// forward has the guest run in the second QEMU, which has all of it.
func (x *exchange) forward(detach context.Context, from station) error {
	p := x.paced()
	if x.PointOfNoReturn != nil && !x.called && from == sent {
		ask, cancel := context.WithTimeout(detach, p.ask)
		err := x.PointOfNoReturn(ask)
		cancel()
		if err != nil {
			x.fail("it is not to go on: %v", err)
			return x.discardLoaded(detach)
		}
	}
	x.called = true
	ask, cancel := context.WithTimeout(detach, p.ask)
	err := x.to.Resume(ask, x.UUID)
	cancel()
	switch {
	case err == nil:
		if !x.sentAt.IsZero() {
			x.c.Pause = x.stood + time.Since(x.sentAt)
			x.sentAt = time.Time{}
		}
		return nil
	case time.Since(x.since) < p.load:
		x.pause = p.look
		return nil
	case from == sent:
		x.fail("it could not be resumed in its second QEMU: %v", err)
		return x.discardLoaded(detach)
	}
	return x.lost("stands still %s, and cannot be resumed: %v", x.toAt, err)
}

// back has the guest run on in the first QEMU. There is no second one.
func (x *exchange) back(detach context.Context) error {
	ask, cancel := context.WithTimeout(detach, x.paced().ask)
	defer cancel()
	if err := x.from.Resume(ask, x.UUID); err != nil {
		if time.Since(x.since) > x.paced().silent {
			return x.lost("stands still %s, and cannot be resumed: %v", x.fromAt, err)
		}
		x.pause = x.paced().look
	}
	return nil
}

// hurry waits for a first QEMU that is sending, and calls it off when it takes
// too long.
func (x *exchange) hurry(detach context.Context) error {
	x.pause = inPause
	if p := x.paced(); time.Since(x.since) > p.migrate {
		x.fail("its first QEMU did not send its state within %s", p.migrate)
		ask, cancel := context.WithTimeout(detach, p.ask)
		defer cancel()
		if _, err := x.from.QMP(ask, x.UUID, "migrate_cancel", nil); err != nil {
			x.Log.Warn("cannot call off the sending of a guest", "guest", x.Guest, "err", err)
		}
		x.pause = p.poll
	}
	return nil
}

// quitFirst ends the first QEMU, which is behind the guest.
func (x *exchange) quitFirst(detach context.Context) error {
	return x.quit(detach, x.from.QuitMigrated, x.fromAt)
}

// discardWaiting ends a second QEMU that no guest will come to.
func (x *exchange) discardWaiting(detach context.Context) error {
	return x.quit(detach, x.to.QuitIncoming, x.toAt)
}

func (x *exchange) quit(detach context.Context, f func(context.Context, string) error, at string) error {
	p := x.paced()
	ask, cancel := context.WithTimeout(detach, p.ask)
	defer cancel()
	x.pause = p.look
	if err := f(ask, x.UUID); err != nil && time.Since(x.since) > p.settle {
		return x.lost("has a QEMU too many %s, which does not end: %v", at, err)
	}
	return nil
}

// discardLoaded ends a second QEMU that has the guest's state but must not run
// it, as the first does. It has it sent to nobody, so that it is "postmigrate"
// and may be ended like any that a guest has left.
func (x *exchange) discardLoaded(detach context.Context) error {
	p := x.paced()
	ctx, cancel := context.WithTimeout(detach, p.migrate)
	defer cancel()
	path, stop, err := x.Twin.Sink(x.UUID)
	if err != nil {
		return err
	}
	defer stop()
	x.pause = p.look
	if err := ignoreShared(ctx, x.to, x.UUID, true); err == nil {
		_, _ = x.to.QMP(ctx, x.UUID, "migrate", map[string]any{"uri": "unix:" + path}) // refused while it is at it
	}
	for {
		switch s, _ := x.station(ctx, x.to); s {
		case noQEMU:
			return nil
		case sent:
			return x.quit(detach, x.to.QuitMigrated, x.toAt)
		}
		if !wait(ctx, p.look) {
			if time.Since(x.since) > p.settle {
				return x.lost("has a QEMU too many %s, which does not end", x.toAt)
			}
			return detach.Err()
		}
	}
}

// crossed is the end of a crossing that was made.
func (x *exchange) crossed(detach context.Context) error {
	if err := x.tidy(detach, x.to); err != nil {
		return err
	}
	return x.s.Save(x.c)
}

// tidy leaves nothing of a crossing but the guest, in this side's QEMU. Above
// all it must not go on leaving memory out of what it writes when it is saved or
// moved.
func (x *exchange) tidy(detach context.Context, side Side) error {
	err := x.retry(detach, func(ctx context.Context) error { return ignoreShared(ctx, side, x.UUID, false) })
	if err != nil {
		return x.lost("runs, but its QEMU would leave its memory out when it is saved or moved (%s is on): %v", capability, err)
	}
	return x.Twin.Lend(x.UUID, !x.out, "", nil)
}

// off is a guest that is nowhere.
func (x *exchange) off() error {
	return errors.Join(x.Twin.Lend(x.UUID, !x.out, "", nil),
		fmt.Errorf("%w: %w", errOff, maint.Problemf(maint.CodeGuestOff, "guest "+x.Guest, "start it if it is wanted", "was shut down while its QEMU was to be changed")))
}
