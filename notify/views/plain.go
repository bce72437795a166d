package views

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/textproto"
	"net/url"
	"runtime/debug"
	"strconv"
	"strings"
	"time"
)

const (
	// plainHead is how long the head of a plain request is at most, bytes.
	plainHead = 2 << 10
	// plainHeaders is how many headers it has at most.
	plainHeaders = 16
	// plainKept is how much of an answer's room is kept for the next at most, bytes.
	plainKept = 4 << 10
	// lingerTime is for how long a connection that we close takes in what was sent:
	// closed with that unread, it would be reset, and the answer lost.
	lingerTime = 500 * time.Millisecond
)

// plainConn is a connection on the fast path. It reuses what it needs for each
// request: a thousand guests wait here most of the time.
type plainConn struct {
	net.Conn
	head   string // that of r, which is asked again as a rule
	r      *http.Request
	header http.Header
	values [plainHeaders]string
	url    url.URL
	w      plainAnswer
	buf    [plainHead]byte // what has been read
	n      int             // and how much
}

// converse answers plain requests until the connection is over. If something else
// comes, it gives the connection with that unread.
func (s *Server) converse(conn net.Conn) (rest net.Conn) {
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("a guest's request was not answered", "panic", p, "stack", string(debug.Stack()))
		}
	}()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	c := &plainConn{Conn: conn, header: make(http.Header), w: plainAnswer{header: make(http.Header)}}
	c.r = new(http.Request).WithContext(s.ConnContext(ctx, conn))
	for wait := headTime; s.await(conn, wait); wait = idleTime {
		end := c.end()
		for end < 0 && c.n < len(c.buf) {
			if c.n > 0 {
				return c.rest() // the rest of the head is late
			}
			n, err := conn.Read(c.buf[:])
			if err != nil {
				return nil
			}
			c.n = n
			end = c.end()
		}
		again := end > 0 && string(c.buf[:end]) == c.head
		if end < 0 || !again && !c.understand(c.buf[:end]) {
			return c.rest()
		}
		c.n = copy(c.buf[:], c.buf[end:c.n])
		if !again || c.w.same == nil || !c.w.same() {
			c.w.clear()
			s.Handler.ServeHTTP(&c.w, c.r)
		}
		if conn.SetWriteDeadline(time.Now().Add(answerTime)) != nil || c.w.send(conn) != nil {
			return nil
		}
		if c.w.closes {
			if closeWrite(conn) == nil && s.await(conn, lingerTime) {
				_, _ = io.Copy(io.Discard, conn) // until the guest hangs up, or the time is over
			}
			return nil
		}
	}
	return nil
}

// end is where the first head that has been read ends; -1: not yet.
func (c *plainConn) end() int {
	i := bytes.Index(c.buf[:c.n], []byte("\r\n\r\n"))
	if i < 0 {
		return -1
	}
	return i + 4
}

// rest gives the connection to who knows more of HTTP.
func (c *plainConn) rest() net.Conn {
	return &begunConn{Conn: c.Conn, read: bytes.Clone(c.buf[:c.n])}
}

// understand reads the head of a request.
func (c *plainConn) understand(head []byte) bool {
	c.head = string(head)
	return c.parse(c.head)
}

// parse reads the head of a request; false: it is not plain. A plain request is a GET
// by HTTP/1.1 of one of our paths, does not wait, has no body, each header once, and
// in none a byte that could be read in two ways.
func (c *plainConn) parse(head string) bool {
	line, head, _ := strings.Cut(head, "\r\n")
	line, get := strings.CutPrefix(line, "GET ")
	target, http11 := strings.CutSuffix(line, " HTTP/1.1")
	path, rawQuery, _ := strings.Cut(target, "?")
	if !get || !http11 || !only(target, isTarget) || strings.Contains(rawQuery, "wait") || !claimed(path) {
		return false
	}
	clear(c.header)
	host := ""
	for n := 0; head != "\r\n"; n++ {
		line, head, _ = strings.Cut(head, "\r\n")
		name, value, is := strings.Cut(line, ":")
		value = strings.Trim(value, " ")
		if !is || name == "" || n == plainHeaders || !only(name, isName) || !only(value, isValue) {
			return false
		}
		name = textproto.CanonicalMIMEHeaderKey(name)
		if _, twice := c.header[name]; twice {
			return false
		}
		switch name {
		case "Content-Length", "Transfer-Encoding", "Trailer", "Expect", "Upgrade", "Pragma":
			return false
		case "Connection":
			if !strings.EqualFold(value, "keep-alive") {
				return false
			}
		case "Host":
			if host != "" || value == "" || !only(value, isHost) {
				return false
			}
			host = value
			continue
		}
		c.values[n] = value
		c.header[name] = c.values[n : n+1 : n+1]
	}
	if host == "" {
		return false
	}
	c.url = url.URL{Path: path, RawQuery: rawQuery}
	r := c.r
	r.Method, r.URL, r.RequestURI, r.Header, r.Host = http.MethodGet, &c.url, target, c.header, host
	r.Proto, r.ProtoMajor, r.ProtoMinor, r.Body = "HTTP/1.1", 1, 1, http.NoBody
	return true
}

func only(s string, is func(byte) bool) bool {
	for i := range len(s) {
		if !is(s[i]) {
			return false
		}
	}
	return true
}

func isName(b byte) bool {
	return 'a' <= b && b <= 'z' || 'A' <= b && b <= 'Z' || '0' <= b && b <= '9' || b == '-'
}
func isHost(b byte) bool   { return isName(b) || b == '.' || b == ':' }
func isTarget(b byte) bool { return isName(b) || strings.IndexByte("/._?=&", b) >= 0 }
func isValue(b byte) bool  { return ' ' <= b && b <= '~' }

// plainAnswer is the answer to a plain request, which is sent when it is known.
type plainAnswer struct {
	header http.Header
	status int
	body   []byte
	out    bytes.Buffer // all of it, as it was sent
	date   time.Time    // in out
	closes bool         // the connection
	same   func() bool  // not nil: it is the answer again, if that says so
}

func (a *plainAnswer) Header() http.Header { return a.header }

func (a *plainAnswer) WriteHeader(status int) {
	if a.status == 0 {
		a.status = status
	}
}

func (a *plainAnswer) Write(p []byte) (int, error) {
	a.WriteHeader(http.StatusOK)
	if len(p) > 0 && (a.status == http.StatusNotModified || a.status == http.StatusNoContent) {
		return 0, http.ErrBodyNotAllowed
	}
	a.body = append(a.body, p...)
	return len(p), nil
}

func (a *plainAnswer) keep(same func() bool) { a.same = same }

// clear makes room for another answer.
func (a *plainAnswer) clear() {
	clear(a.header)
	a.status, a.body, a.same = 0, a.body[:0], nil
	a.out.Reset()
	if a.out.Cap() > plainKept {
		a.body, a.out = nil, bytes.Buffer{}
	}
}

const plainDate = "Date: "

// send sends the answer, or what was sent once more.
func (a *plainAnswer) send(to net.Conn) error {
	if a.status == 0 {
		return errors.New("the request was not answered")
	}
	now := time.Now().UTC().Truncate(time.Second)
	switch {
	case a.out.Len() == 0:
		a.write(now)
	case !now.Equal(a.date):
		all := a.out.Bytes()
		now.AppendFormat(all[:bytes.Index(all, []byte(plainDate))+len(plainDate)], http.TimeFormat) // which is as long
		a.date = now
	}
	_, err := to.Write(a.out.Bytes())
	if a.same == nil || a.out.Len() > plainKept {
		a.clear()
	}
	return err
}

// write makes the answer what is sent.
func (a *plainAnswer) write(now time.Time) {
	a.date, a.closes = now, a.header.Get("Connection") == "close"
	a.out.WriteString("HTTP/1.1 ")
	a.out.WriteString(strconv.Itoa(a.status))
	a.out.WriteByte(' ')
	a.out.WriteString(http.StatusText(a.status))
	a.out.WriteString("\r\n" + plainDate)
	a.out.Write(now.AppendFormat(a.out.AvailableBuffer(), http.TimeFormat))
	a.out.WriteString("\r\n")
	for name, values := range a.header {
		for _, v := range values {
			if only(v, isValue) {
				a.out.WriteString(name)
				a.out.WriteString(": ")
				a.out.WriteString(v)
				a.out.WriteString("\r\n")
			}
		}
	}
	a.out.WriteString("\r\n")
	a.out.Write(a.body)
}
