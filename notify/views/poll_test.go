package views

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"belay/agent/maint"
)

// parked is a request that may be answered later.
type parked struct {
	w    *httptest.ResponseRecorder
	done chan struct{}
	gone context.CancelFunc // its client goes away
}

func park(h http.Handler, r *http.Request) *parked {
	ctx, cancel := context.WithCancel(r.Context())
	p := &parked{w: httptest.NewRecorder(), done: make(chan struct{}), gone: cancel}
	go func() {
		defer close(p.done)
		h.ServeHTTP(p.w, r.WithContext(ctx))
	}()
	return p
}

// waits reports whether it is not answered although nothing moves.
func (p *parked) waits() bool {
	synctest.Wait()
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// polls are a long poll on every document of events, and what it says of a
// reboot.
func polls(known bool) []struct{ target, header, says string } {
	all := []struct{ target, header, says string }{
		{azureNow + "&wait=30s&incarnation=1", ours, `"Reboot"`},
		{"/belay/v1/events?wait=30s&incarnation=1", ours, `"Reboot"`},
		{"/computeMetadata/v1/instance/maintenance-event?wait_for_change=true&timeout_sec=30", google, "TERMINATE"},
		{"/computeMetadata/v1/instance/maintenance-event?wait=30s", google, "TERMINATE"},
		{"/computeMetadata/v1/instance/upcoming-maintenance?wait_for_change=true&timeout_sec=30", google, "PENDING"},
		{"/computeMetadata/v1/?recursive=true&wait_for_change=true&timeout_sec=30", google, "TERMINATE"},
		{"/latest/meta-data/events/maintenance/scheduled?wait=30s", "", "system-reboot"},
	}
	if !known {
		for i := range all {
			all[i].target = strings.TrimSuffix(all[i].target, "&incarnation=1")
		}
	}
	return all
}

func TestLongPolls(t *testing.T) {
	for _, known := range []bool{true, false} {
		for _, p := range polls(known) {
			t.Run(p.target, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld()
					h := handler(t, w, func(c *Config) { c.EC2.IMDSv1 = true })
					one := park(h, request("GET", p.target, "", p.header))
					if !one.waits() {
						t.Fatalf("it was answered at once: %d %s", one.w.Code, one.w.Body)
					}
					w.show(guestB, with(freeze(), maint.ImpactReboot))
					if !one.waits() {
						t.Fatal("another guest's change was answered")
					}
					time.Sleep(29 * time.Second)
					w.show(guestA, with(freeze(), maint.ImpactReboot))
					if one.waits() || one.w.Code != 200 || !strings.Contains(one.w.Body.String(), p.says) || one.w.Result().Header.Get("ETag") == "" {
						t.Fatalf("after the change: %d %s", one.w.Code, one.w.Body)
					}
					// Who knows less is answered at once.
					tag := one.w.Result().Header.Get("ETag")
					if known && strings.Contains(p.target, "incarnation") {
						if park(h, request("GET", p.target, "", p.header)).waits() {
							t.Error("an old incarnation waits")
						}
					}
					// After the wait, what is there is answered.
					two := park(h, request("GET", strings.TrimSuffix(p.target, "&incarnation=1"), "", p.header, "If-None-Match: "+tag))
					if time.Sleep(29 * time.Second); !two.waits() {
						t.Error("what is known was answered")
					}
					if time.Sleep(time.Second); two.waits() || two.w.Code != 304 {
						t.Errorf("after its wait: %d", two.w.Code)
					}
					if h.clients[guestA].parked != 0 {
						t.Error("something is counted as parked")
					}
				})
			})
		}
	}
}

func TestGCELastETag(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		h := handler(t, w)
		const path = "/computeMetadata/v1/instance/maintenance-event"
		tag := ask(h, "GET", path, "", google).Header.Get("ETag")
		wait := path + "?wait_for_change=true&last_etag="
		want(t, ask(h, "GET", wait+"0", "", google), 200, "NONE") // at once
		one := park(h, request("GET", wait+tag+"&timeout_sec=60", "", google))
		if !one.waits() {
			t.Fatal("what is known was answered at once")
		}
		w.show(guestA, with(freeze(), maint.ImpactPreempt)) // the value is the same
		if !one.waits() {
			t.Error("the same value was answered")
		}
		if time.Sleep(time.Minute); one.waits() || one.w.Code != 200 || one.w.Body.String() != "NONE" {
			t.Errorf("after its time: %d %s", one.w.Code, one.w.Body)
		}
		want(t, ask(h, "GET", wait+tag+"&timeout_sec=0", "", google), 200, "NONE")
		two := park(h, request("GET", wait+tag, "", google))
		if time.Sleep(5*time.Minute - time.Second); !two.waits() {
			t.Error("without a time it was answered too early")
		}
		if time.Sleep(time.Second); two.waits() {
			t.Error("without a time it waits for ever")
		}
		// What is not there is not waited for.
		want(t, ask(h, "GET", "/computeMetadata/v1/instance/nothing?wait_for_change=true", "", google), 404, "*")
	})
}

func TestParkedAtMost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		h := handler(t, w, func(c *Config) { c.Limits.Parked = 3 })
		poll := func() *http.Request { return request("GET", azureNow+"&wait=1h", "", ours) }
		var all []*parked
		for range 3 {
			all = append(all, park(h, poll()))
		}
		synctest.Wait()
		want(t, serve(h, poll()), 429, "*")
		want(t, ask(h, "GET", azureNow, "", ours), 200, "*")
		all[0].gone() // its place is free
		<-all[0].done
		all = append(all, park(h, poll()))
		if !all[3].waits() {
			t.Error("there is no place after one has gone away")
		}
		if time.Sleep(5 * time.Minute); all[1].waits() {
			t.Error("an hour was waited for")
		}
	})
}

func TestDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		h := handler(t, w)
		poll := func() *http.Request { return request("GET", azureNow+"&wait=30s", "", ours) }
		one, two := park(h, poll()), park(h, poll())
		synctest.Wait()
		if err := h.Drain(t.Context(), guestA, 10*time.Second); err != nil {
			t.Fatal(err)
		}
		for _, p := range []*parked{one, two} {
			<-p.done
			if p.w.Code != 200 || p.w.Header().Get("Connection") != "close" || !p.w.Flushed {
				t.Errorf("it ended with %d %v", p.w.Code, p.w.Header())
			}
		}
		for _, r := range []*http.Request{poll(), request("GET", azureNow, "", ours), request("POST", azureNow, "", ours)} {
			if a := serve(h, r); a.Header.Get("Connection") != "close" {
				t.Errorf("%s %s leaves the connection open: %d", r.Method, r.URL, a.StatusCode)
			}
		}
		if err := h.Drain(t.Context(), guestA, 10*time.Second); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		three := park(h, poll())
		if !three.waits() || ask(h, "GET", azureNow, "", ours).Header.Get("Connection") != "" {
			t.Error("it is drained for ever")
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		h.mu.Lock()
		h.clients[guestA].parked++ // one that does not take in its answer
		h.mu.Unlock()
		if err := h.Drain(ctx, guestA, time.Second); !errors.Is(err, context.Canceled) {
			t.Errorf("draining what does not end ended with %v", err)
		}
		<-three.done
		if err := h.Drain(t.Context(), "nobody", time.Second); err != nil {
			t.Error(err)
		}
	})
}

func TestStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := handler(t, newWorld())
		poll := func() *http.Request { return request("GET", azureNow+"&wait=30s", "", ours) }
		one := park(h, poll())
		synctest.Wait()
		h.Stop()
		h.Stop()
		<-one.done
		if one.w.Code != 200 || one.w.Header().Get("Connection") != "close" {
			t.Errorf("it ended with %d %v", one.w.Code, one.w.Header())
		}
		want(t, serve(h, poll()), 200, "*")
	})
}
