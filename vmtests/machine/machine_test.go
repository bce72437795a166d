package machine

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

func TestQMP(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		says      []string // after the greeting, a line for each command
		want, err string
	}{
		"answer":           {[]string{`{"return": {}}`, `{"return": {"status": "running"}}`}, `{"status": "running"}`, ""},
		"events between":   {[]string{`{"return": {}}`, `{"event": "RESET"}` + "\n" + `{"return": {"a": 1}}`}, `{"a": 1}`, ""},
		"refused":          {[]string{`{"return": {}}`, `{"error": {"class": "GenericError", "desc": "no such thing"}}`}, "", "query-status: no such thing"},
		"ended by command": {[]string{`{"return": {}}`}, "", "EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			socket := filepath.Join(t.TempDir(), "qmp")
			l, err := net.Listen("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				defer conn.Close()
				fmt.Fprintln(conn, `{"QMP": {"version": {}, "capabilities": []}}`)
				in := bufio.NewScanner(conn)
				for _, line := range c.says {
					if !in.Scan() {
						return
					}
					fmt.Fprintln(conn, line)
				}
				in.Scan()
			}()
			got, err := qmp(t.Context(), socket, "query-status", nil)
			if string(got) != c.want || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("got %s, %v; want %s, %q", got, err, c.want, c.err)
			}
		})
	}
}

func TestPanics(t *testing.T) {
	t.Parallel()
	h := &Host{Dir: t.TempDir()}
	if got := h.panics(); got != nil {
		t.Errorf("a host that was never on has panicked: %q", got)
	}
	console := "[    1.0] Linux version 6.1\n[   42.5] Kernel panic - not syncing: Fatal exception\n[   42.6] Rebooting in 1 seconds..\n"
	if err := os.WriteFile(h.file("console"), []byte(console), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := h.panics(); len(got) != 1 || got[0] != "[   42.5] Kernel panic - not syncing: Fatal exception" {
		t.Errorf("got %q", got)
	}
}

func bridgeMAC(t *testing.T, l *lan) (mac net.HardwareAddr) {
	t.Helper()
	err := l.within(func() error {
		bridge, err := netlink.LinkByName("br0")
		if err == nil {
			mac = bridge.Attrs().HardwareAddr
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return mac
}

// TestLAN speaks on the LAN as a host would, by its tap.
func TestLAN(t *testing.T) {
	if os.Getenv("BELAY_LAB") == "skip" || os.Geteuid() != 0 {
		t.Skip("taps need root, and BELAY_LAB not to be skip")
	}
	t.Parallel()
	l, err := newLAN(netip.MustParsePrefix("10.77.0.254/16"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	tap, err := l.addTap("host-a")
	if err != nil {
		t.Fatal(err)
	}
	defer tap.Close()
	conn, err := l.listenUDP()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	port := conn.LocalAddr().(*net.UDPAddr).Port
	frame := []byte{ // a virtio-net header, Ethernet, IPv4 from 10.77.0.1 to 10.77.0.254, UDP, "ping"
		0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
		0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0, 0x77, 0, 1, 8, 0,
		0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0, 10, 77, 0, 1, 10, 77, 0, 254,
		0x04, 0xd2, byte(port >> 8), byte(port), 0, 12, 0, 0, 'p', 'i', 'n', 'g',
	}
	sum := uint32(0)
	header := frame[24:44]
	for i := 0; i < len(header); i += 2 {
		sum += uint32(header[i])<<8 | uint32(header[i+1])
	}
	sum = sum>>16 + sum&0xffff
	header[10], header[11] = byte(^sum>>8), byte(^sum)
	if err := conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	copy(frame[10:16], bridgeMAC(t, l))
	if _, err := tap.Write(frame); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 16)
	n, err := io.ReadAtLeast(conn, got, 4)
	if err != nil || string(got[:n]) != "ping" {
		t.Errorf("got %q, %v", got[:n], err)
	}
}
