package agent

import (
	"context"
	"log/slog"
	"net"
	"path/filepath"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/notify/channel"
	"belay/notify/channel/wire"
)

// A guest that has a new QEMU has a new socket too, and may never have been seen off.
func TestSerialChannelFollowsQEMU(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	s := &guestServer{agent: &Agent{log: log}, channels: channel.NewListener(log), serial: make(map[string]serial)}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for _, name := range []string{"domain-1-web-1", "domain-2-web-1"} {
		socket := filepath.Join(t.TempDir(), name)
		in, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		s.update(ctx, []maint.Guest{{UUID: "u", Name: "web-1", State: maint.GuestRunning,
			Devices: []maint.Device{{Kind: "channel", Target: wire.Name, Source: socket}}}})
		if err := in.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		c, err := in.Accept()
		if err != nil {
			t.Fatalf("nobody serves %s: %v", name, err)
		}
		defer c.Close()
	}
}
