package views

import (
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// query are the parameters of a request, each given once.
type query struct {
	pairs [8]struct{ name, value string }
	n     int
}

// parseQuery reads a query, and copies nothing that needs no decoding.
func parseQuery(raw string) (q query, err error) {
	for raw != "" {
		var one string
		one, raw, _ = strings.Cut(raw, "&")
		if one == "" {
			continue
		}
		name, value, _ := strings.Cut(one, "=")
		if name, err = url.QueryUnescape(name); err == nil {
			value, err = url.QueryUnescape(value)
		}
		if err != nil {
			return query{}, fmt.Errorf("the query cannot be read: %w", err)
		}
		if _, twice := q.get(name); twice {
			return query{}, fmt.Errorf("query parameter %q is given more than once: give it once", name)
		}
		if q.n == len(q.pairs) {
			return query{}, fmt.Errorf("the query has more than %d parameters: leave out what is not needed", len(q.pairs))
		}
		q.pairs[q.n].name, q.pairs[q.n].value = name, value
		q.n++
	}
	return q, nil
}

func (q *query) get(name string) (value string, there bool) {
	for _, p := range q.pairs[:q.n] {
		if p.name == name {
			return p.value, true
		}
	}
	return "", false
}

// is reports whether a switch is on, as in "recursive=true".
func (q *query) is(name string) bool {
	v, _ := q.get(name)
	return strings.EqualFold(v, "true")
}

// longPoll is what our own parameters say: wait=DURATION, for what is another
// than incarnation=N or, without that, than the ETag in If-None-Match. known is
// "" where the caller knows nothing.
func (c *call) longPoll() (known string, wait time.Duration, err error) {
	if v, there := c.query.get("wait"); there {
		if wait, err = time.ParseDuration(v); err != nil || wait < 0 {
			return "", 0, fmt.Errorf("wait=%q is not a time to wait: give one such as 30s", v)
		}
	}
	known = c.r.Header.Get("If-None-Match")
	if v, there := c.query.get("incarnation"); there {
		n, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			return "", 0, fmt.Errorf("incarnation=%q is not the number of a document: give the one last seen", v)
		}
		known = strconv.FormatUint(n, 10)
	}
	return known, wait, nil
}
