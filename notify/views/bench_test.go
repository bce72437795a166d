package views

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"time"

	"belay/notify"
)

// quiet takes an answer and keeps nothing.
type quiet struct{ header http.Header }

func (q *quiet) Header() http.Header         { return q.header }
func (q *quiet) Write(b []byte) (int, error) { return len(b), nil }
func (q *quiet) WriteHeader(int)             {}

// BenchmarkAzureGet is the handler alone.
func BenchmarkAzureGet(b *testing.B) {
	for _, test := range []struct {
		name    string
		header  []string
		present bool
	}{{"none", nil, false}, {"one", nil, true}, {"known", []string{`If-None-Match: "2"`}, true}} {
		b.Run(test.name, func(b *testing.B) {
			w := newWorld()
			if test.present {
				w.show(guestA, freeze())
			}
			h := handler(b, w)
			r := request("GET", azureNow, "", append(test.header, ours)...)
			q := &quiet{header: make(http.Header)}
			b.ReportAllocs()
			for b.Loop() {
				clear(q.header)
				h.ServeHTTP(q, r)
			}
		})
	}
}

// BenchmarkAzureGetTCP is with a server and a client over loopback.
func BenchmarkAzureGetTCP(b *testing.B) {
	w := newWorld()
	w.show(guestA, freeze())
	c := clientOf(b, listen(b, handler(b, w)))
	r := fromOutside(b, "GET", azureNow, ours)
	b.ReportAllocs()
	for b.Loop() {
		a, err := c.Do(r)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, a.Body); err != nil {
			b.Fatal(err)
		}
		a.Body.Close()
	}
}

// BenchmarkVisible is how long after a change 200 guests that wait have seen it.
func BenchmarkVisible(b *testing.B) {
	const guests = 200
	w := newWorld()
	name := func(i int) string { return fmt.Sprintf("%08d-0000-4000-8000-000000000001", i) }
	for i := range guests {
		w.guests[name(i)] = &guestWorld{doc: notify.Document{Incarnation: 1}, changed: make(chan struct{})}
	}
	h := handler(b, w)
	var took []time.Duration
	for b.Loop() {
		var answered sync.WaitGroup
		seen := make([]time.Time, guests)
		for i := range guests {
			r := request("GET", azureNow+"&wait=1m", "", ours)
			r = r.WithContext(notify.WithGuest(r.Context(), name(i)))
			answered.Go(func() {
				h.ServeHTTP(httptest.NewRecorder(), r)
				seen[i] = time.Now()
			})
		}
		for i := range guests {
			awaitParked(b, h, name(i), 1)
		}
		begun := time.Now()
		for i := range guests {
			e := freeze()
			e.Guests[0].UUID = name(i)
			w.show(name(i), e)
		}
		answered.Wait()
		for _, at := range seen {
			took = append(took, at.Sub(begun))
		}
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
}
