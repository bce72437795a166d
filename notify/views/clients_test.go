package views

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"cloud.google.com/go/compute/metadata"
	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"

	"belay/agent/maint"
	"belay/notify"
)

// TestGoogleClient has Google's Go client follow maintenance events.
func TestGoogleClient(t *testing.T) {
	t.Setenv("GCE_METADATA_HOST", "metadata.google.internal")
	w := newWorld()
	h := handler(t, w)
	c := metadata.NewWithOptions(&metadata.Options{Client: clientOf(t, listen(t, h))})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()

	if name, err := c.InstanceNameWithContext(ctx); name != "web-1" || err != nil {
		t.Errorf("its name is %q, %v", name, err)
	}
	if ip, err := c.InternalIPWithContext(ctx); ip != "10.0.0.1" || err != nil {
		t.Errorf("its address is %q, %v", ip, err)
	}
	var none metadata.NotDefinedError
	if _, err := c.GetWithContext(ctx, "instance/attributes/x"); !errors.As(err, &none) {
		t.Errorf("what is not there: %v", err)
	}
	// Each value seen leads to the next change, which only a long poll sees.
	next := [][]maint.ScheduledEvent{{freeze()}, {started(freeze())}, {with(freeze(), maint.ImpactReboot)}, {}}
	enough := errors.New("enough")
	var seen []string
	err := c.SubscribeWithContext(ctx, "instance/maintenance-event", func(_ context.Context, v string, ok bool) error {
		if seen = append(seen, v); len(seen) == 4 || !ok {
			return enough
		}
		go func(step int) {
			awaitParked(t, h, guestA, 1)
			if step == 2 { // the value stays the same: no answer
				w.show(guestA, next[1]...)
				step++
			}
			w.show(guestA, next[step-1]...)
		}([]int{1, 2, 4}[len(seen)-1])
		return nil
	})
	if words := []string{"NONE", "MIGRATE_ON_HOST_MAINTENANCE", "TERMINATE_ON_HOST_MAINTENANCE", "NONE"}; !errors.Is(err, enough) || !slices.Equal(seen, words) {
		t.Errorf("seen were %v, %v", seen, err)
	}
}

// TestAmazonClient has the AWS SDK for Go get a token and read with it, also
// after the host has become another and refuses the token.
func TestAmazonClient(t *testing.T) {
	w := newWorld()
	w.show(guestA, with(freeze(), maint.ImpactReboot))
	h := handler(t, w)
	c := imds.New(imds.Options{
		Endpoint: "http://" + notify.Address, HTTPClient: clientOf(t, listen(t, h)), EnableFallback: aws.FalseTernary,
	})
	get := func(path string) string {
		t.Helper()
		out, err := c.GetMetadata(t.Context(), &imds.GetMetadataInput{Path: path})
		if err != nil {
			t.Fatal(err)
		}
		defer out.Content.Close()
		b, err := io.ReadAll(out.Content)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if got := get("instance-id"); got != guestA {
		t.Errorf("it is %q", got)
	}
	if got := get(""); !strings.HasPrefix(got, "events/\n") {
		t.Errorf("it has %q", got)
	}
	var events []struct{ NotBefore, NotAfter, Code, EventId, State string }
	if err := json.Unmarshal([]byte(get("events/maintenance/scheduled")), &events); err != nil || len(events) != 1 || events[0].Code != "system-reboot" {
		t.Errorf("announced is %v, %v", events, err)
	}
	h.key[0]++
	if got := get("local-hostname"); got != "web-1" {
		t.Errorf("on another host its name is %q", got)
	}
}
