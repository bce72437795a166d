package views

import (
	"net/http"
	"time"

	"belay/agent/maint"
	"belay/notify"
)

// document answers with what render makes of the guest's document: at once if
// the caller does not wait or knows something else, else when what it knows has
// changed or its wait is over. What is compared is the ETag: an answer without one
// is not waited for.
func (c *call) document(known string, wait time.Duration, render func(notify.Document) answer) answer {
	doc, changed := c.source.Document(c.guest)
	a := render(doc)
	if known == "" {
		known = a.etag
	}
	if wait <= 0 || a.etag == "" || !sameTag(known, a.etag) {
		return a
	}
	drained, unpark := c.enter(c.client)
	if unpark == nil {
		return busy()
	}
	c.unpark = unpark
	wait = min(wait, c.limits.Wait)
	// The server's time-out is for requests that are answered at once.
	_ = http.NewResponseController(c.w).SetWriteDeadline(time.Now().Add(wait + answerTime))
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for sameTag(known, a.etag) {
		select {
		case <-changed:
			doc, changed = c.source.Document(c.guest)
			a = render(doc)
		case <-drained:
			a.close = true
			return a
		case <-c.stopped:
			a.close = true
			return a
		case <-timer.C:
			return a
		case <-c.r.Context().Done():
			return a
		}
	}
	return a
}

// concerns reports whether an event is about a guest. Sources give no others;
// views rely on nobody.
func concerns(e *maint.ScheduledEvent, guest string) bool {
	for i := range e.Guests {
		if e.Guests[i].UUID == guest {
			return true
		}
	}
	return false
}

// visible are the events that a document shows a guest.
func visible(doc notify.Document, guest string) func(yield func(*maint.ScheduledEvent) bool) {
	return func(yield func(*maint.ScheduledEvent) bool) {
		for i := range doc.Events {
			e := &doc.Events[i]
			if !e.State.Over() && concerns(e, guest) && !yield(e) {
				return
			}
		}
	}
}

// begins is when an event starts at the earliest, or has started.
func begins(e *maint.ScheduledEvent) time.Time {
	if e.Started.IsZero() {
		return e.NotBefore
	}
	return e.Started
}

// assumedDuration stands in for a duration that is not known, where the form
// must have an end.
const assumedDuration = time.Hour

// ends is when an event is expected to be over, was, or would have been.
func ends(e *maint.ScheduledEvent) time.Time {
	switch {
	case e.State == maint.EventCompleted:
		return e.Ended
	case e.Duration == maint.DurationUnknown:
		return begins(e).Add(assumedDuration)
	}
	return begins(e).Add(e.Duration)
}
