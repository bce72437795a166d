package wire

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Kinds of frames.
const (
	frameOpen byte = iota + 1
	frameData
	frameCredit
	frameFin
	frameClose
	frameAlive
)

const headerLen = 1 + 4 + 2

// errEnded is why a session is over that was closed here.
var errEnded = fmt.Errorf("the session was closed: %w", net.ErrClosed)

// past is a deadline that ends what waits.
var past = time.Unix(1, 0)

// Session is streams over a port until it ends.
type Session struct {
	p        *Port
	host     bool
	accepted chan *Stream  // on the host
	turns    chan struct{} // on the guest: has one for each stream
	done     chan struct{}

	// writing is held for a frame, before mu.
	writing sync.Mutex
	frame   []byte
	mask    number
	pos     int // in the mask

	mu      sync.Mutex
	streams map[uint32]*Stream
	last    uint32 // the latest stream's number
	err     error  // why it is over
}

func newSession(p *Port, n number, host bool) *Session {
	s := &Session{p: p, host: host, mask: n, accepted: make(chan *Stream, MaxStreams),
		turns: make(chan struct{}, MaxStreams), done: make(chan struct{}), streams: make(map[uint32]*Stream)}
	p.r.begin(n)
	go s.run()
	go s.stayAlive()
	return s
}

// Done is closed when the session is over, and the port is free for another.
func (s *Session) Done() <-chan struct{} { return s.done }

// Err is why the session is over.
func (s *Session) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Close ends the session and its streams, not the transport.
func (s *Session) Close() {
	s.end(errEnded)
	<-s.done
}

// Accept waits for the guest to open a stream.
func (s *Session) Accept() (*Stream, error) {
	select {
	case st := <-s.accepted:
		return st, nil
	case <-s.done:
		return nil, s.Err()
	}
}

// Open begins a stream, once there are fewer than MaxStreams. An error is that of
// ctx, or why the session is over.
func (s *Session) Open(ctx context.Context) (*Stream, error) {
	select {
	case s.turns <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-s.done:
		return nil, s.Err()
	}
	var st *Stream
	err := s.send(func(b []byte) []byte {
		s.last++
		st = s.add(s.last)
		return header(b, frameOpen, st.id, 0)
	})
	if err != nil {
		return nil, err
	}
	return st, nil
}

// add makes a stream, under mu.
func (s *Session) add(id uint32) *Stream {
	st := &Stream{s: s, id: id, room: window, credit: window}
	st.changed.L = &s.mu
	s.streams[id] = st
	return st
}

// end has the session be over: who reads or writes is woken.
func (s *Session) end(why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return
	}
	s.err = why
	for _, st := range s.streams {
		st.changed.Broadcast()
	}
	s.p.t.SetReadDeadline(past)
	s.p.t.SetWriteDeadline(past)
}

// run is the session's life.
func (s *Session) run() {
	s.end(s.receive())
	s.writing.Lock() // nobody writes any more
	defer s.writing.Unlock()
	close(s.done)
}

// stayAlive tells the other side that this one is there.
func (s *Session) stayAlive() {
	tick := time.NewTicker(aliveEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			s.send(func(b []byte) []byte { return header(b, frameAlive, 0, 0) })
		case <-s.done:
			return
		}
	}
}

func header(b []byte, kind byte, id uint32, n int) []byte {
	b = binary.BigEndian.AppendUint32(append(b, kind), id)
	return binary.BigEndian.AppendUint16(b, uint16(n))
}

// send writes the frame that compose, under mu, appends; none if that is empty.
// An error is why the session is over.
func (s *Session) send(compose func([]byte) []byte) error {
	s.writing.Lock()
	defer s.writing.Unlock()
	s.mu.Lock()
	err := s.err
	if err == nil {
		s.frame = compose(s.frame[:0])
		err = s.p.t.SetWriteDeadline(time.Now().Add(writeTimeout)) // not after end has set its own
	}
	s.mu.Unlock()
	if err == nil && len(s.frame) > 0 {
		s.pos = s.mask.apply(s.frame, s.pos)
		_, err = s.p.t.Write(s.frame)
	}
	if err != nil {
		s.end(fmt.Errorf("cannot write to the channel: %w", err))
		return s.Err()
	}
	return nil
}

// receive reads frames until the session is over, and writes none.
func (s *Session) receive() error {
	var h [headerLen]byte
	data := make([]byte, maxData)
	for {
		if err := s.expect(); err != nil {
			return err
		}
		if _, err := io.ReadFull(&s.p.r, h[:]); err != nil {
			return fmt.Errorf("cannot read from the channel: %w", err)
		}
		id, n := binary.BigEndian.Uint32(h[1:]), int(binary.BigEndian.Uint16(h[5:]))
		if h[0] != frameData {
			if err := s.control(h[0], id, n); err != nil {
				return err
			}
			continue
		}
		if err := s.admit(id, n); err != nil {
			return err
		}
		if _, err := io.ReadFull(&s.p.r, data[:n]); err != nil {
			return fmt.Errorf("cannot read from the channel: %w", err)
		}
		s.deliver(id, data[:n])
	}
}

// expect sets the deadline of the next frame.
func (s *Session) expect() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	return s.p.t.SetReadDeadline(time.Now().Add(silence))
}

// control takes a frame without data. Those for streams that are over here may
// have been on their way, and mean nothing.
func (s *Session) control(kind byte, id uint32, n int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if kind == frameAlive {
		return nil
	}
	if kind == frameOpen {
		if !s.host || id <= s.last || len(s.streams) >= MaxStreams {
			return fmt.Errorf("the other side may not open stream %d (the latest is %d, %d are open)", id, s.last, len(s.streams))
		}
		s.last = id
		s.accepted <- s.add(id) // has room: those in it are not closed here, so they are in streams
		return nil
	}
	if kind != frameCredit && kind != frameFin && kind != frameClose {
		return fmt.Errorf("the other side sent a frame of an unknown kind %d", kind)
	}
	if st := s.streams[id]; st != nil {
		return st.told(kind, n)
	}
	return nil
}

// admit checks data before it is read.
func (s *Session) admit(id uint32, n int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.streams[id]
	if st == nil || st.gotFin || n > maxData || n > st.room {
		return fmt.Errorf("the other side sent %d bytes for stream %d that it may not send", n, id)
	}
	st.room -= n
	return nil
}

// deliver gives data that was admitted to who reads the stream.
func (s *Session) deliver(id uint32, data []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if st := s.streams[id]; st != nil && !st.closed {
		st.in.Write(data)
		st.changed.Broadcast()
	}
}
