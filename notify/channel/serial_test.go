package channel

import (
	"context"
	"log/slog"
	"net"
	"testing"
	"testing/synctest"
	"time"
)

// Of a guest that sends without end no more is read than is bounded.
func TestFloodBySerialPort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host, guest := net.Pipe()
		l := NewListener(slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { defer close(ended); _ = l.attend(ctx, "u", host) }()
		go func() { // what the host says
			b := make([]byte, 1024)
			for {
				if _, err := guest.Read(b); err != nil {
					return
				}
			}
		}()
		const long = 10 * time.Second
		sent, garbage := 0, make([]byte, 4096)
		for begun := time.Now(); time.Since(begun) < long; {
			n, err := guest.Write(garbage)
			if err != nil {
				t.Fatal(err)
			}
			// Nothing takes time here that is not waited for.
			if sent += n; sent > 100<<20 {
				t.Fatalf("%d bytes were taken in %s", sent, time.Since(begun))
			}
		}
		if most := int(long/time.Second)*mostRead + burstRead + 2*len(garbage); sent > most {
			t.Errorf("in %s %d bytes were taken, which is more than %d", long, sent, most)
		}
		cancel()
		<-ended
		guest.Close()
	})
}
