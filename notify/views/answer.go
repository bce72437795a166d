package views

import (
	"encoding/json"
	"hash/fnv"
	"net/http"
	"strconv"
	"strings"
)

const (
	typeText = "text/plain; charset=utf-8"
	typeJSON = "application/json; charset=utf-8"
)

// answer is what a view says.
type answer struct {
	status int
	body   []byte
	json   func() any // makes the body, when it is known to be needed
	ctype  string
	etag   string // as in the header; "": it has none
	// number is that of a document, and numbered says that there is one: the answer to
	// the same request is the same until the guest's document has another.
	number   uint64
	numbered bool
	allow    string // the methods, with 405
	retry    bool   // ask again in a second
	close    bool   // and end the connection
}

// refuse answers with a reason for people to read.
func refuse(status int, reason string) answer {
	return answer{status: status, body: []byte(reason + "\n"), ctype: typeText}
}

func text(s string) answer {
	return answer{status: http.StatusOK, body: []byte(s), ctype: typeText}
}

// object answers with JSON.
func object(status int, v any) answer {
	return answer{status: status, body: encode(v), ctype: typeJSON}
}

// numbered answers with a document that is told from others by its number alone:
// polls that find the one they know need no body.
func numbered(incarnation uint64, content func() any) answer {
	return answer{status: http.StatusOK, json: content, ctype: typeJSON, etag: strconv.Quote(strconv.FormatUint(incarnation, 10)),
		number: incarnation, numbered: true}
}

// encode writes as JSON what is ours, and can be.
func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic("views: " + err.Error())
	}
	return b
}

func wrongMethod(allow string) answer {
	a := refuse(http.StatusMethodNotAllowed, "this is asked with "+allow)
	a.allow = allow
	return a
}

func busy() answer {
	a := refuse(http.StatusTooManyRequests, "too many requests: ask less often, or with a long poll")
	a.retry = true
	return a
}

// tag gives an answer an ETag made of what it says.
func (a answer) tag() answer {
	f := fnv.New64a()
	f.Write(a.body)
	a.etag = strconv.Quote(strconv.FormatUint(f.Sum64(), 16))
	return a
}

func (a answer) write(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	if a.etag != "" {
		h.Set("Etag", a.etag)
		if a.status == http.StatusOK && r.Method == http.MethodGet && matches(r.Header["If-None-Match"], a.etag) {
			a.status, a.body, a.json, a.ctype = http.StatusNotModified, nil, nil, ""
		}
	}
	if a.json != nil {
		a.body = encode(a.json())
	}
	if a.ctype != "" {
		h.Set("Content-Type", a.ctype)
		h.Set("X-Content-Type-Options", "nosniff")
	}
	if a.allow != "" {
		h.Set("Allow", a.allow)
	}
	if a.retry {
		h.Set("Retry-After", "1")
	}
	if a.close {
		h.Set("Connection", "close")
	}
	if a.status != http.StatusNotModified && a.status != http.StatusNoContent {
		h.Set("Content-Length", strconv.Itoa(len(a.body)))
	}
	w.WriteHeader(a.status)
	_, _ = w.Write(a.body) // who has gone away needs no answer
}

// matches reports whether an If-None-Match names an ETag. Some clients leave out
// the quotes.
func matches(header []string, etag string) bool {
	for _, line := range header {
		for one := range strings.SplitSeq(line, ",") {
			if one = strings.TrimSpace(one); one == "*" || sameTag(one, etag) {
				return true
			}
		}
	}
	return false
}

func sameTag(a, b string) bool {
	bare := func(s string) string { return strings.Trim(strings.TrimPrefix(s, "W/"), `"`) }
	return bare(a) == bare(b)
}
