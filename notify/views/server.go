package views

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"
)

// How long a guest may take to send the head of a request, all of it, and to take
// in the answer; and how long its connection may do nothing.
const (
	headTime    = 5 * time.Second
	requestTime = 10 * time.Second
	answerTime  = 10 * time.Second
	idleTime    = 2 * time.Minute
)

// Server answers guests over HTTP/1. Its methods are those of http.Server.
//
// Nearly all requests are a few lines alike, and are answered at once: each guest
// asks every second whether there is anything new. For these net/http does much
// that they do not need, and costs more than all else together. So there is a fast
// path (plainRequest), and a connection on which anything else comes is given to
// net/http, for good and with what has been read of it.
type Server struct {
	// Handler answers. It must not keep a request.
	Handler http.Handler
	// ConnContext says with notify.WithGuest who is at the other end.
	ConnContext func(ctx context.Context, c net.Conn) context.Context

	full http.Server
	log  *slog.Logger

	mu      sync.Mutex
	ended   bool
	in      []net.Listener
	conns   map[net.Conn]struct{} // on the fast path
	serving sync.WaitGroup        // these connections
}

// NewServer makes a server of a handler. Who serves sets ConnContext.
//
// A guest has 5 s for its headers, 10 s for all of a request, and 10 s for the
// answer. Shutdown ends its long polls.
func NewServer(h *Handler) *Server {
	s := &Server{Handler: h, log: h.log, conns: make(map[net.Conn]struct{})}
	s.full = http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.Handler.ServeHTTP(w, r) }),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return s.ConnContext(ctx, c.(*begunConn).Conn)
		},
		ReadHeaderTimeout:            headTime,
		ReadTimeout:                  requestTime,
		WriteTimeout:                 requestTime + answerTime, // from the end of the headers
		IdleTimeout:                  idleTime,
		MaxHeaderBytes:               8 << 10,
		DisableGeneralOptionsHandler: true,
		// A slog.Handler escapes what guests have sent.
		ErrorLog: slog.NewLogLogger(h.log.Handler(), slog.LevelWarn),
	}
	s.full.RegisterOnShutdown(h.Stop)
	return s
}

// Serve answers who comes by a listener, until Shutdown or Close: then its error is
// http.ErrServerClosed. It closes the listener.
func (s *Server) Serve(in net.Listener) error {
	s.mu.Lock()
	ended := s.ended
	s.in = append(s.in, in)
	s.mu.Unlock()
	defer in.Close()
	if ended {
		return http.ErrServerClosed
	}
	odd := &begun{addr: in.Addr(), conns: make(chan net.Conn), closed: make(chan struct{})}
	var full sync.WaitGroup
	full.Go(func() { _ = s.full.Serve(odd) }) // it ends with odd
	defer full.Wait()
	defer odd.Close()
	for wait := time.Duration(0); ; {
		c, err := in.Accept()
		switch {
		case err == nil:
			wait = 0
			s.start(c, odd)
			continue
		case s.over():
			return http.ErrServerClosed
		case !errors.Is(err, syscall.EMFILE) && !errors.Is(err, syscall.ENFILE) && !errors.Is(err, syscall.ECONNABORTED):
			return err
		}
		wait = min(max(2*wait, 5*time.Millisecond), time.Second)
		s.log.Warn("a guest's connection cannot be accepted now", "err", err, "again in", wait)
		time.Sleep(wait)
	}
}

func (s *Server) over() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ended
}

// start answers a connection on the fast path.
func (s *Server) start(c net.Conn, odd *begun) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		c.Close()
		return
	}
	s.conns[c] = struct{}{}
	s.serving.Go(func() {
		rest := s.converse(c)
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
		if rest == nil || !odd.offer(rest) {
			c.Close()
		}
	})
}

// await has a connection wait for a request no longer than that; false: the server
// is ending.
func (s *Server) await(c net.Conn, atMost time.Duration) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.ended && c.SetReadDeadline(time.Now().Add(atMost)) == nil
}

// end closes the listeners, and calls f for each connection on the fast path.
func (s *Server) end(f func(net.Conn)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
	for _, in := range s.in {
		_ = in.Close() // it may be closed already
	}
	for c := range s.conns {
		f(c)
	}
}

// Shutdown stops accepting, ends long polls, and returns when all requests have been
// answered, or with ctx's error.
func (s *Server) Shutdown(ctx context.Context) error {
	s.end(func(c net.Conn) { _ = c.SetReadDeadline(time.Unix(1, 0)) })
	err := s.full.Shutdown(ctx)
	done := make(chan struct{})
	go func() { s.serving.Wait(); close(done) }()
	select {
	case <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Close ends everything at once.
func (s *Server) Close() error {
	s.end(func(c net.Conn) { _ = c.Close() })
	return s.full.Close()
}

// begun is a listener that accepts connections of which something has been read.
type begun struct {
	addr   net.Addr
	conns  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

func (b *begun) Accept() (net.Conn, error) {
	select {
	case c := <-b.conns:
		return c, nil
	case <-b.closed:
		return nil, net.ErrClosed
	}
}

func (b *begun) offer(c net.Conn) (taken bool) {
	select {
	case b.conns <- c:
		return true
	case <-b.closed:
		return false
	}
}

func (b *begun) Close() error   { b.once.Do(func() { close(b.closed) }); return nil }
func (b *begun) Addr() net.Addr { return b.addr }

// begunConn is a connection that gives once more what has been read of it.
type begunConn struct {
	net.Conn
	read []byte
}

func (c *begunConn) Read(p []byte) (int, error) {
	if len(c.read) > 0 {
		n := copy(p, c.read)
		c.read = c.read[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}

// CloseWrite has http.Server end a connection such that the guest gets all that was
// sent to it.
func (c *begunConn) CloseWrite() error { return closeWrite(c.Conn) }

func closeWrite(c net.Conn) error {
	if half, can := c.(interface{ CloseWrite() error }); can {
		return half.CloseWrite()
	}
	return nil
}
