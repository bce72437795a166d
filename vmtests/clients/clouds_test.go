package clients

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"cloud.google.com/go/compute/metadata"
	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"

	"belay/agent/maint"
	"belay/notify"
)

// TestGoogleSubscriber has Google's library subscribe to maintenance events, and
// a program that knows Azure's form approve them: both see one event.
func TestGoogleSubscriber(t *testing.T) {
	t.Parallel()
	h, guests := newHost(t, "web-1", "web-2")
	g := guests[0]
	c := metadata.NewWithOptions(&metadata.Options{Client: g.client()})
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()

	var id maint.EventID
	next := []struct {
		word string
		then func()
	}{
		{"NONE", func() {
			h.announce(maint.ImpactReboot, guests[1]) // another guest's: no answer
			id = h.announce(maint.ImpactFreeze, g)
		}},
		{"MIGRATE_ON_HOST_MAINTENANCE", func() {
			approve(t, g, id)
			h.awaitApproval(id, g)
			h.start(id) // the word stays: no answer
			h.end(id, g)
		}},
		{"NONE", func() { id = h.announce(maint.ImpactReboot, g) }},
		{"TERMINATE_ON_HOST_MAINTENANCE", func() { h.cancel(id) }},
		{"NONE", nil},
	}
	over := errors.New("over")
	err := c.SubscribeWithContext(ctx, "instance/maintenance-event", func(_ context.Context, word string, there bool) error {
		if !there || word != next[0].word {
			return fmt.Errorf("it is %q, %t, want %q", word, there, next[0].word)
		}
		then := next[0].then
		if next = next[1:]; then == nil {
			return over
		}
		then()
		return nil
	})
	if !errors.Is(err, over) {
		t.Error(err)
	}
}

// approve has an event start as a client of Azure's form does.
func approve(t *testing.T, g *guest, id maint.EventID) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+notify.Address+"/metadata/scheduledevents?api-version=2020-07-01",
		strings.NewReader(fmt.Sprintf(`{"StartRequests":[{"EventId":%q}]}`, id)))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Metadata", "true")
	resp, err := g.client().Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("approval is answered with %s", resp.Status)
	}
}

// TestAmazonReader has Amazon's library read an event through its life.
func TestAmazonReader(t *testing.T) {
	t.Parallel()
	h, guests := newHost(t, "web-1")
	g := guests[0]
	c := imds.New(imds.Options{Endpoint: "http://" + notify.Address, HTTPClient: g.client(), EnableFallback: aws.FalseTernary})
	reads := func(list, want string) {
		t.Helper()
		out, err := c.GetMetadata(t.Context(), &imds.GetMetadataInput{Path: "events/maintenance/" + list})
		if err != nil {
			t.Fatal(err)
		}
		defer out.Content.Close()
		b, err := io.ReadAll(out.Content)
		if err != nil {
			t.Fatal(err)
		}
		var events []struct{ Code, EventID, State string }
		if err := json.Unmarshal(b, &events); err != nil {
			t.Fatalf("%s: %v", b, err)
		}
		if got := fmt.Sprint(events); got != want {
			t.Errorf("%s are %s, want %s", list, got, want)
		}
	}
	reads("scheduled", "[]")
	id := h.announce(maint.ImpactFreeze, g)
	reads("scheduled", fmt.Sprintf("[{system-maintenance %s active}]", id))
	approve(t, g, id)
	h.awaitApproval(id, g)
	h.start(id)
	reads("scheduled", fmt.Sprintf("[{system-maintenance %s active}]", id))
	h.end(id, g)
	reads("scheduled", "[]")
	reads("history", fmt.Sprintf("[{system-maintenance %s completed}]", id))
	next := h.announce(maint.ImpactReboot, g)
	h.cancel(next)
	reads("scheduled", "[]")
	reads("history", fmt.Sprintf("[{system-reboot %s canceled} {system-maintenance %s completed}]", next, id))
}
