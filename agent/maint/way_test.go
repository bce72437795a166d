package maint

import (
	"strings"
	"testing"
	"unicode"
)

func TestLanding(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		way     Way
		landing Landing
		says    string // "" for one that is fine
	}{
		{"none", Way{}, Landing{}, ""},
		{"a peer that does not say", Way{URI: "tcp://192.0.2.2:49200"}, Landing{}, ""},
		{"where it is to go", Way{URI: "rdma://host-b"}, Landing{URI: "rdma://host-b"}, ""},
		{"elsewhere", Way{URI: "tcp://192.0.2.2"}, Landing{URI: "tcp://198.51.100.9", Listen: "198.51.100.9"}, "and not at tcp://192.0.2.2"},
		{"an address", Way{}, Landing{URI: "tcp://192.0.2.2", Listen: "192.0.2.2", TLSName: "host-b"}, ""},
		{"an address of IPv6", Way{}, Landing{URI: "tcp://[2001:db8::2]", Listen: "2001:db8::2"}, ""},
		{"a name", Way{}, Landing{URI: "tcp://host-b"}, "is not of the form"},
		{"a file", Way{}, Landing{URI: "unix:///run/x"}, "is not of the form"},
		{"a command", Way{}, Landing{URI: "exec:rm"}, "is not of the form"},
		{"a path behind it", Way{}, Landing{URI: "tcp://192.0.2.2/x?y"}, "is not of the form"},
		{"another transport in brackets", Way{}, Landing{URI: "rdma://[2001:db8::2]"}, "is not of the form"},
		{"no transport", Way{}, Landing{URI: "[2001:db8::2]"}, "is not of the form"},
		{"half a bracket", Way{}, Landing{URI: "tcp://[2001:db8::2"}, "is not of the form"},
		{"a port", Way{}, Landing{URI: "tcp://192.0.2.2:1"}, "is not of the form"},
		{"an escape", Way{}, Landing{URI: "tcp://192.0.2.2\x1b[2J"}, "is not of the form"},
		{"nowhere to listen", Way{}, Landing{URI: "tcp://192.0.2.2", Listen: "all"}, "no address to listen on"},
		{"a name with a line end", Way{}, Landing{TLSName: "b\nc"}, "no certificate's name"},
		{"a long name", Way{}, Landing{TLSName: strings.Repeat("b", 256)}, "no certificate's name"},
	} {
		err := c.landing.Validate(c.way)
		switch {
		case c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)):
			t.Errorf("%s: %v", c.name, err)
		case err != nil && strings.ContainsFunc(err.Error(), func(r rune) bool { return !unicode.IsPrint(r) }):
			t.Errorf("%s: %q is shown on a terminal", c.name, err)
		}
	}
}

func TestShellWord(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{"/disks/web-1.raw": "/disks/web-1.raw", "": "''", "a b": "'a b'", "/d/x;reboot": "'/d/x;reboot'",
		"$(id)": "'$(id)'", "it's": `'it'\''s'`, "-rf": "'-rf'", "~": "'~'", "a\\": `'a\'`, "ü": "'ü'"} {
		if got := ShellWord(text); got != want {
			t.Errorf("%q is %s, want %s", text, got, want)
		}
	}
}

func TestPeerRoom(t *testing.T) {
	t.Parallel()
	for _, r := range []PeerRoom{{}, {In: 1}, {In: 1, Out: -1}, {In: 1 << 40, Out: 1}} {
		if r.Validate() == nil {
			t.Errorf("%+v is taken", r)
		}
	}
	if err := (PeerRoom{In: 1, Out: 2}).Validate(); err != nil {
		t.Error(err)
	}
}
