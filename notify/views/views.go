package views

import (
	"crypto/rand"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"belay/notify"
)

// Config is what views are made of.
type Config struct {
	Source notify.Source
	Limits Limits
	EC2    EC2
	// Upstream is another metadata service, which answers all that is not about
	// events; nil: there is none. It is told who asks by the headers
	// X-Belay-Guest-Uuid, X-Belay-Guest-Name and X-Forwarded-For, and must not be
	// reached by anybody else. EC2's tokens are ours, and say nothing to it.
	Upstream *url.URL
	Log      *slog.Logger     // slog.Default() if nil
	Now      func() time.Time // time.Now if nil
}

// EC2 are the options of the EC2 view.
type EC2 struct {
	// IMDSv1 also answers requests without a token. A page in a guest's browser,
	// or a proxy in it, can then ask in its name.
	IMDSv1 bool
	// ShowFreeze shows a Freeze as system-maintenance. Some clients leave an
	// instance when they see one.
	ShowFreeze bool
}

// Handler answers guests.
type Handler struct {
	source notify.Source
	limits Limits
	ec2    EC2
	log    *slog.Logger
	now    func() time.Time
	key    [32]byte // authenticates EC2's tokens

	upstream http.Handler // nil: there is none

	stopped chan struct{} // closed by Stop
	stop    sync.Once

	mu      sync.Mutex
	clients map[string]*client // by UUID
	swept   time.Time
}

// New makes a handler of all views. Who asks is what notify.WithGuest has put
// into a request's context.
func New(cfg Config) *Handler {
	h := &Handler{
		source: cfg.Source, limits: cfg.Limits.orDefault(), ec2: cfg.EC2, log: cfg.Log, now: cfg.Now,
		stopped: make(chan struct{}), clients: make(map[string]*client),
	}
	if h.log == nil {
		h.log = slog.Default()
	}
	if h.now == nil {
		h.now = time.Now
	}
	if cfg.Upstream != nil {
		h.upstream = newUpstream(cfg.Upstream, h.source, h.log)
	}
	rand.Read(h.key[:]) // never fails
	return h
}

// call is one request of a guest.
type call struct {
	*Handler
	w      http.ResponseWriter
	r      *http.Request
	guest  string // UUID
	client *client
	query  query
	unpark func() // not nil: it was parked
}

// view answers the requests for a path and what is below it.
type view func(c *call, path string) answer

// route finds the view of a path. Paths are compared as they were sent: nothing
// is cleaned, and a path in an unusual encoding is none of ours.
func route(r *http.Request) view {
	path := r.URL.Path
	switch {
	case r.URL.RawPath != "":
		return nil
	case path == azureEventsPath:
		return azureEvents
	case path == azureInstancePath, strings.HasPrefix(path, azureInstancePath+"/"):
		return azureInstance
	case path == gcePath, strings.HasPrefix(path, gcePath+"/"):
		return gce
	case strings.HasPrefix(path, ownPath):
		return own
	case ec2Version(path) != "":
		return ec2
	}
	return nil
}

// ServeHTTP answers a guest; who is nobody's guest finds nothing here.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	guest, known := notify.GuestOf(r.Context())
	if !known {
		refuse(http.StatusNotFound, "not found").write(w, r)
		return
	}
	theirs := h.upstream != nil && !claimed(r.URL.Path)
	v := route(r)
	q, err := parseQuery(r.URL.RawQuery)
	k, stray := kindOf(r, &q), !ourHost(r.Host)
	if stray || v == nil && !theirs {
		k = kindNone
	}
	cl, draining, admitted := h.admit(guest, k)
	defer h.leave(cl)
	if draining {
		w.Header().Set("Connection", "close")
	}
	switch {
	case !admitted:
		h.holdUp(r.Context())
		busy().write(w, r)
		return
	case stray:
		refuse(http.StatusForbidden, "this is not the host that was asked for: ask "+notify.Address).write(w, r)
		return
	case theirs:
		r.Body = http.MaxBytesReader(w, r.Body, upstreamBody)
		h.upstream.ServeHTTP(w, r)
		return
	case v == nil:
		refuse(http.StatusNotFound, "not found").write(w, r)
		return
	case err != nil:
		refuse(http.StatusBadRequest, err.Error()).write(w, r)
		return
	}
	c := &call{Handler: h, w: w, r: r, guest: guest, client: cl, query: q}
	defer func() {
		if c.unpark != nil {
			// Whoever drains waits until the answer is on its way.
			_ = http.NewResponseController(w).Flush()
			c.unpark()
		}
	}()
	a := v(c, r.URL.Path)
	a.write(w, r)
	if keep, can := w.(keeper); can && a.numbered && k == kindGet && !draining {
		keep.keep(func() bool { return h.same(guest, a.number) })
	}
}

// keeper is a ResponseWriter that gives its answer once more when the same request comes
// by the same connection and same, which counts as that request, says so.
type keeper interface{ keep(same func() bool) }

// same reports whether a guest's document is still that one, and lets a request for it
// in.
func (h *Handler) same(guest string, number uint64) bool {
	if doc, _ := h.source.Document(guest); doc.Incarnation != number {
		return false
	}
	cl, draining, admitted := h.admit(guest, kindGet)
	h.leave(cl)
	return admitted && !draining
}

// ourHost reports whether a request was meant for a metadata service. A page
// that has its own name resolve to our address must not get an answer.
func ourHost(host string) bool {
	host = strings.TrimSuffix(strings.TrimSuffix(host, ":80"), ".")
	switch strings.ToLower(host) {
	case notify.Address, "metadata.google.internal", "metadata", "instance-data":
		return true
	}
	return false
}
