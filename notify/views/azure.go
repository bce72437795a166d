package views

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"belay/agent/maint"
	"belay/notify"
)

const azureEventsPath = "/metadata/scheduledevents"

// The versions of the API that differ in what an event says, the oldest first.
const (
	azure201708 = iota
	azure201711 // + type Preempt
	azure201901 // + type Terminate
	azure201904 // + Description
	azure201908 // + EventSource
	azure202007 // + DurationInSeconds
)

func azureEventVersions() []string {
	return []string{
		azure201708: "2017-08-01", azure201711: "2017-11-01", azure201901: "2019-01-01",
		azure201904: "2019-04-01", azure201908: "2019-08-01", azure202007: "2020-07-01",
	}
}

// azureEvents is Azure's Scheduled Events (Microsoft Learn, "Azure Metadata
// Service: Scheduled Events for Linux VMs").
func azureEvents(c *call, _ string) answer {
	if c.r.Method != http.MethodGet && c.r.Method != http.MethodPost {
		return wrongMethod("GET, POST")
	}
	version, refused := azureRules(c, azureEventVersions(), http.StatusNotFound)
	if refused != nil {
		return *refused
	}
	if c.r.Method == http.MethodPost {
		return azureStart(c)
	}
	known, wait, err := c.longPoll()
	if err != nil {
		return azureError(http.StatusBadRequest, err.Error())
	}
	return c.document(known, wait, func(doc notify.Document) answer {
		return numbered(doc.Incarnation, func() any { return azureDocumentOf(doc, c.guest, version) })
	})
}

// azureRules checks what all requests in Azure's form have: the header that no
// web page can send, no proxy's, and a known version, of which it gives the index.
func azureRules(c *call, versions []string, unknown int) (version int, refused *answer) {
	no := func(status int, reason string) (int, *answer) {
		a := azureError(status, reason)
		return 0, &a
	}
	if why := wrongHeaders(c.r); why != "" {
		return no(http.StatusBadRequest, why)
	}
	v, there := c.query.get("api-version")
	if !there {
		newest := slices.Clone(versions[max(0, len(versions)-3):])
		slices.Reverse(newest)
		a := object(http.StatusBadRequest, map[string]any{
			"error":           "Bad request. api-version was not specified in the request: give one of newest-versions",
			"newest-versions": newest,
		})
		return 0, &a
	}
	if version = slices.Index(versions, v); version < 0 {
		return no(unknown, fmt.Sprintf("api-version %q is not known: give one such as %s", v, versions[len(versions)-1]))
	}
	return version, nil
}

// wrongHeaders says why a request must be refused for its headers, "" if it need
// not. A browser adds no header of its own for a page from elsewhere, and a proxy
// that would be used against its guest tells by X-Forwarded-For.
func wrongHeaders(r *http.Request) string {
	switch m := r.Header["Metadata"]; {
	case len(m) != 1 || !strings.EqualFold(m[0], "true"):
		return "the required header is missing: send Metadata: true"
	case forwarded(r):
		return noForwarding
	}
	return ""
}

const noForwarding = "a request that has been forwarded is not answered: ask directly, without X-Forwarded-For"

func forwarded(r *http.Request) bool { return len(r.Header["X-Forwarded-For"]) > 0 }

func azureError(status int, reason string) answer {
	return object(status, map[string]string{"error": reason})
}

type azureDocument struct {
	DocumentIncarnation uint64
	Events              []azureEvent
}

type azureEvent struct {
	EventID           string `json:"EventId"`
	EventStatus       string
	EventType         maint.Impact
	ResourceType      string
	Resources         []string
	NotBefore         string
	Description       *string            `json:",omitempty"`
	EventSource       *maint.EventSource `json:",omitempty"`
	DurationInSeconds *int64             `json:",omitempty"`
}

func azureDocumentOf(doc notify.Document, guest string, version int) azureDocument {
	out := azureDocument{DocumentIncarnation: doc.Incarnation, Events: []azureEvent{}}
	for e := range visible(doc, guest) {
		if e.Impact == maint.ImpactPreempt && version < azure201711 || e.Impact == maint.ImpactTerminate && version < azure201901 {
			continue
		}
		a := azureEvent{
			EventID: string(e.ID), EventStatus: AzureStatus(e.State), EventType: e.Impact,
			ResourceType: "VirtualMachine", Resources: make([]string, len(e.Guests)),
		}
		for i := range e.Guests {
			a.Resources[i] = e.Guests[i].Name
		}
		if e.State == maint.EventScheduled {
			a.NotBefore = e.NotBefore.UTC().Format(http.TimeFormat)
		}
		if version >= azure201904 {
			a.Description = &e.Description
		}
		if version >= azure201908 {
			a.EventSource = &e.Source
		}
		if version >= azure202007 {
			s := azureSeconds(e.Duration)
			a.DurationInSeconds = &s
		}
		out.Events = append(out.Events, a)
	}
	return out
}

// AzureStatus is Azure's word for an event's state (EventStatus); "" for one that
// is over, which Azure does not show.
func AzureStatus(s maint.EventState) string {
	switch s {
	case maint.EventScheduled:
		return "Scheduled"
	case maint.EventStarted:
		return "Started"
	}
	return ""
}

// azureSeconds rounds up: 0 says that nothing is felt. -1: not known.
func azureSeconds(d time.Duration) int64 {
	if d == maint.DurationUnknown {
		return -1
	}
	return int64((d + time.Second - 1) / time.Second)
}

// What a guest may send at most.
const (
	maxBody   = 16 << 10 // bytes
	maxStarts = 100      // events to start
)

// azureStart approves events. Content-Type and If-None-Match do not matter.
func azureStart(c *call) answer {
	ids, err := startRequests(http.MaxBytesReader(nil, c.r.Body, maxBody))
	if err != nil {
		return azureError(http.StatusBadRequest, err.Error())
	}
	// What can be approved is, also beside what cannot.
	refused := answer{status: http.StatusOK}
	for _, id := range ids {
		err := c.source.Approve(c.r.Context(), c.guest, id)
		switch {
		case err == nil:
		case errors.Is(err, maint.ErrUnknownEvent):
			refused = azureError(http.StatusBadRequest, fmt.Sprintf("there is no event %q: give the EventId of one in the document", id))
		default:
			p, status := c.problem(err)
			refused = azureError(status, p.Error())
		}
	}
	return refused
}

// startRequests reads {"StartRequests":[{"EventId":"..."}]}. Clients send more
// than that, and a byte order mark before it.
func startRequests(body io.Reader) ([]maint.EventID, error) {
	const form = `send {"StartRequests":[{"EventId":"..."}]}`
	b, err := io.ReadAll(body)
	if err != nil {
		return nil, fmt.Errorf("the body cannot be read: %w: send at most %d bytes", err, maxBody)
	}
	var doc struct {
		StartRequests []struct{ EventID maint.EventID }
	}
	if err := json.Unmarshal(bytes.TrimPrefix(b, []byte("\xef\xbb\xbf")), &doc); err != nil {
		return nil, fmt.Errorf("the body is not a request to start events: %w: %s", err, form)
	}
	if len(doc.StartRequests) == 0 {
		return nil, fmt.Errorf("the body names no event: %s", form)
	}
	var ids []maint.EventID
	for _, r := range doc.StartRequests {
		switch {
		case r.EventID == "":
			return nil, fmt.Errorf("a request has no EventId: %s", form)
		case slices.Contains(ids, r.EventID):
			continue
		case len(ids) == maxStarts:
			return nil, fmt.Errorf("the body names more than %d events: send several", maxStarts)
		}
		ids = append(ids, r.EventID)
	}
	return ids, nil
}
