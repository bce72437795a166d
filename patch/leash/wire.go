package leash

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"belay/agent/maint"
)

// Holder and leash speak JSON lines: the holder asks, the leash answers each
// request once, in order.
const (
	doArm      = "arm"      // Order: what is to be held
	doTake     = "take"     // Order: as the holder knows it; by one that comes back
	doRenew    = "renew"    //
	doPaused   = "paused"   // Guests: by Belay
	doLeft     = "left"     // Guests: not Belay's to release
	doReleased = "released" // Guests
	doStatus   = "status"
	doDisarm   = "disarm"
)

// request is what a holder asks.
type request struct {
	ID     uint64   `json:"id"`
	Do     string   `json:"do"`
	Order  *Status  `json:"order,omitempty"`
	Guests []string `json:"guests,omitempty"` // UUIDs
}

// reply is the answer to the request of the same ID, 0 for one that could not
// be read.
type reply struct {
	ID      uint64         `json:"id"`
	Problem *maint.Problem `json:"problem,omitempty"`
	Fired   string         `json:"fired,omitempty"`  // why it has begun to release
	Status  *Status        `json:"status,omitempty"` // of arm, take, status, disarm
}

const (
	// maxRequest is room for the largest order, bytes.
	maxRequest = 4 << 20
	// maxReply is room for that and all events.
	maxReply = 16 << 20
)

var errTooLong = errors.New("message is too long")

// lines reads messages of a line each, no longer than most.
type lines struct {
	r    *bufio.Reader
	most int
}

func newLines(r io.Reader, most int) *lines { return &lines{bufio.NewReader(r), most} }

// next reads one message into v. An error that is a *json.SyntaxError or the
// like leaves the reader at the next line; errTooLong and those of the
// connection do not.
func (l *lines) next(v any) error {
	var line []byte
	for {
		part, err := l.r.ReadSlice('\n')
		if len(line)+len(part) > l.most {
			return errTooLong
		}
		line = append(line, part...)
		if err == nil {
			break
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return &lostError{err}
		}
	}
	if err := json.Unmarshal(bytes.TrimSpace(line), v); err != nil {
		return fmt.Errorf("message cannot be read: %w", err)
	}
	return nil
}

// lostError is the end of a connection.
type lostError struct{ err error }

func (e *lostError) Error() string { return e.err.Error() }
func (e *lostError) Unwrap() error { return e.err }

// encode makes a line of a message.
func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("leash: %T cannot be encoded: %v", v, err)) // there is nothing in it that cannot
	}
	return append(b, '\n')
}
