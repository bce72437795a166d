package leash

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"belay/agent/maint"
)

// replyTimeout bounds the writing of an answer to a holder that reads none.
const replyTimeout = 5 * time.Second

// serve takes holders until ctx ends.
func (k *Keeper) serve(ctx context.Context, l net.Listener) {
	var holders sync.WaitGroup
	defer holders.Wait()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				c.Close()
			}
			return
		}
		if err != nil {
			// Out of descriptors, or the like. The order is kept whatever
			// becomes of the socket.
			k.cfg.Log.Error("cannot take a holder", "op", k.cfg.Op, "err", err)
			select {
			case <-time.After(tick):
			case <-ctx.Done():
			}
			if errors.Is(err, net.ErrClosed) {
				return
			}
			continue
		}
		holders.Go(func() { k.hold(ctx, c) })
	}
}

// hold answers one holder until it goes.
func (k *Keeper) hold(ctx context.Context, c net.Conn) {
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	in := newLines(c, maxRequest)
	for {
		var r request
		err := in.next(&r)
		var lost *lostError
		if errors.As(err, &lost) {
			return
		}
		answer, tooLong := reply{ID: r.ID}, false
		if err == nil {
			answer.Status, err = k.answer(ctx, r)
		} else {
			answer.ID = 0
			tooLong = errors.Is(err, errTooLong)
			err = maint.Problemf(maint.CodeBadRequest, "leash "+string(k.cfg.Op), "", "%v", err)
		}
		if err != nil {
			answer.Problem = maint.AsProblem(err, maint.CodeInternal, "leash "+string(k.cfg.Op))
			if answer.Problem.Code != maint.CodeBusy { // a holder tries that again and again
				k.cfg.Log.Warn("request refused", "op", k.cfg.Op, "request", r.Do, "err", err)
			}
		}
		answer.Fired = k.fired()
		_ = c.SetWriteDeadline(time.Now().Add(replyTimeout))
		_, writeErr := c.Write(encode(answer))
		if r.Do == doDisarm && err == nil {
			k.once.Do(func() { close(k.over) })
		}
		if writeErr != nil || tooLong {
			return // what follows is not the beginning of a message
		}
	}
}

// answer does what a request asks. A request that is refused changes nothing,
// and does not count as a word of belayd.
func (k *Keeper) answer(ctx context.Context, r request) (s *Status, err error) {
	switch r.Do {
	case doArm, doTake:
		if err = k.arm(ctx, r.Order, r.Do == doTake); err == nil {
			s, err = k.status()
		}
	case doRenew:
		err = k.renew()
	case doPaused:
		err = k.tell(r.Guests, Paused)
	case doLeft:
		err = k.tell(r.Guests, Left)
	case doReleased:
		err = k.tell(r.Guests, Released)
	case doStatus:
		s, err = k.status()
	case doDisarm:
		return k.disarm()
	default:
		err = maint.Problemf(maint.CodeBadRequest, "leash "+string(k.cfg.Op), "", "knows no request %q", r.Do)
	}
	if err == nil {
		k.heard()
	}
	return s, err
}
