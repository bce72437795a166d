package migrate

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"belay/agent/maint"
)

func TestGate(t *testing.T) {
	t.Parallel()
	own := netip.MustParseAddr("198.51.100.2")
	cert := Certificate{File: "/pki/server-cert.pem", Leaf: &x509.Certificate{DNSNames: []string{"host-b", "*.example.net"}, IPAddresses: []net.IP{net.ParseIP("192.0.2.2")}}}
	wiring := Wiring{Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.2"), own, netip.MustParseAddr("2001:db8::2")}, First: 49152, Last: 49153, Server: cert}
	busy := func(at ...string) Wiring {
		w := wiring
		for _, a := range at {
			w.Listening = append(w.Listening, netip.MustParseAddrPort(a))
		}
		return w
	}
	with := func(c Certificate) Wiring { w := wiring; w.Server = c; return w }
	for _, c := range []struct {
		name    string
		gate    Gate
		way     *maint.Way
		wiring  Wiring
		landing maint.Landing
		codes   []maint.Code
		says    string
	}{
		{"nothing is set", Gate{}, &maint.Way{}, wiring, maint.Landing{}, nil, ""},
		{"an older source", Gate{Address: own}, nil, wiring, maint.Landing{}, nil, ""},
		{"an older source, and TLS", Gate{TLS: true}, nil, wiring, maint.Landing{}, []maint.Code{maint.CodeTLS}, "too old"},
		{"a source without TLS", Gate{TLS: true}, &maint.Way{}, wiring, maint.Landing{}, []maint.Code{maint.CodeTLS}, "without"},
		{"TLS", Gate{TLS: true}, &maint.Way{TLS: true}, wiring, maint.Landing{TLSName: "host-b"}, nil, ""},
		{"TLS by a name that it has", Gate{}, &maint.Way{TLS: true, TLSName: "b.example.net"}, wiring, maint.Landing{TLSName: "b.example.net"}, nil, ""},
		{"TLS by another's name", Gate{}, &maint.Way{TLS: true, TLSName: "host-c"}, wiring, maint.Landing{}, []maint.Code{maint.CodeCertificate}, "is for host-b, *.example.net, 192.0.2.2, and not for host-c"},
		{"TLS, expired", Gate{}, &maint.Way{TLS: true}, with(Certificate{File: "/pki/server-cert.pem", Fault: "expired at 2026-01-01", Remedy: "renew it"}), maint.Landing{}, []maint.Code{maint.CodeCertificate}, "/pki/server-cert.pem expired"},
		{"expired, and nobody asks for TLS", Gate{}, &maint.Way{}, with(Certificate{Fault: "expired"}), maint.Landing{}, nil, ""},
		{"a certificate that cannot be read", Gate{}, &maint.Way{TLS: true, TLSName: "host-c"}, with(Certificate{}), maint.Landing{TLSName: "host-c"}, nil, ""},
		{"a common name only", Gate{}, &maint.Way{TLS: true}, with(Certificate{Leaf: &x509.Certificate{Subject: pkix.Name{CommonName: "b"}}}), maint.Landing{TLSName: "b"}, nil, ""},
		{"of a CA that the source trusts", Gate{}, &maint.Way{TLS: true, CAs: []string{"c0", "ca"}}, with(Certificate{Leaf: cert.Leaf, Issuers: []string{"ca"}}), maint.Landing{TLSName: "host-b"}, nil, ""},
		{"of another CA", Gate{}, &maint.Way{TLS: true, CAs: []string{"c0"}}, with(Certificate{Leaf: cert.Leaf, Issuers: []string{"ca"}}), maint.Landing{}, []maint.Code{maint.CodeCertificate}, "does not trust on the source"},
		{"its own address", Gate{Address: own}, &maint.Way{}, wiring, maint.Landing{URI: "tcp://198.51.100.2", Listen: "198.51.100.2"}, nil, ""},
		{"an address of IPv6", Gate{Address: netip.MustParseAddr("2001:db8::2")}, &maint.Way{}, wiring, maint.Landing{URI: "tcp://[2001:db8::2]", Listen: "2001:db8::2"}, nil, ""},
		{"the source's has precedence", Gate{Address: own}, &maint.Way{URI: "tcp://192.0.2.2"}, wiring, maint.Landing{URI: "tcp://192.0.2.2", Listen: "192.0.2.2"}, nil, ""},
		{"an address that it has not", Gate{Address: netip.MustParseAddr("198.51.100.9")}, &maint.Way{}, wiring, maint.Landing{URI: "tcp://198.51.100.9", Listen: "198.51.100.9"}, []maint.Code{maint.CodeMigrationNetwork}, "no address 198.51.100.9"},
		{"a name is libvirt's to resolve", Gate{}, &maint.Way{URI: "tcp://host-b.mig"}, wiring, maint.Landing{URI: "tcp://host-b.mig"}, nil, ""},
		{"another transport is libvirt's", Gate{}, &maint.Way{URI: "rdma://192.0.2.9"}, wiring, maint.Landing{URI: "rdma://192.0.2.9"}, nil, ""},
		{"a port that is taken", Gate{}, &maint.Way{URI: "tcp://192.0.2.2:49200"}, busy("0.0.0.0:49200"), maint.Landing{URI: "tcp://192.0.2.2:49200", Listen: "192.0.2.2"}, []maint.Code{maint.CodePort}, "49200"},
		{"one port of the range is free", Gate{}, &maint.Way{}, busy("0.0.0.0:49152"), maint.Landing{}, nil, ""},
		{"no port is free", Gate{}, &maint.Way{}, busy("0.0.0.0:49152", "[::]:49153"), maint.Landing{}, []maint.Code{maint.CodePort}, "49152 to 49153"},
		{"taken on another address", Gate{Address: own}, &maint.Way{}, busy("192.0.2.2:49152", "192.0.2.2:49153"), maint.Landing{URI: "tcp://198.51.100.2", Listen: "198.51.100.2"}, nil, ""},
	} {
		c.gate.Host = "b"
		l, ps := c.gate.CheckWay(c.way, c.wiring)
		if diff := cmp.Diff(c.landing, l); diff != "" {
			t.Errorf("%s: landing (-want +got):\n%s", c.name, diff)
		}
		var codes []maint.Code
		for _, p := range ps {
			codes = append(codes, p.Code)
			if p.Remedy == "" || !strings.Contains(p.Reason, c.says) {
				t.Errorf("%s: %+v", c.name, p)
			}
		}
		if diff := cmp.Diff(c.codes, codes); diff != "" {
			t.Errorf("%s: problems (-want +got):\n%s", c.name, diff)
		}
	}
}

func TestPlainWay(t *testing.T) {
	t.Parallel()
	for uri, refused := range map[string]bool{"qemu+tls://b/system": false, "qemu+ssh://b/system": false, "qemu+tcp://b/system": true, "qemu+ext://b/system": true} {
		if ps := PlainWay("b", maint.MoveParams{DestURI: uri}); len(ps) > 0 != refused {
			t.Errorf("%s: %v", uri, ps)
		}
	}
	for uri, refused := range map[string]bool{"": false, "tcp://192.0.2.2": false, "tcp://[2001:db8::2]:49152": false, "rdma://192.0.2.2": true} {
		if ps := PlainWay("b", maint.MoveParams{DestURI: "qemu+tls://b/system", MigrateURI: uri}); len(ps) > 0 != refused {
			t.Errorf("%s: %v", uri, ps)
		}
	}
}

func TestAble(t *testing.T) {
	t.Parallel()
	all := maint.MoveSupport{Capabilities: []string{"xbzrle", "multifd", "zero-copy-send"}, Multifd: []string{"none", "zlib", "zstd"}}
	for _, c := range []struct {
		name    string
		p       maint.MoveParams
		has     maint.MoveSupport
		err     error
		want    maint.MoveParams
		without string
	}{
		{"all is there", maint.MoveParams{Compression: "xbzrle"}, all, nil, maint.MoveParams{Compression: "xbzrle"}, ""},
		{"several connections compress", maint.MoveParams{Compression: "zstd"}, all, nil, maint.MoveParams{Compression: "zstd", Parallel: 4}, ""},
		{"more are kept", maint.MoveParams{Compression: "zstd", Parallel: 8}, all, nil, maint.MoveParams{Compression: "zstd", Parallel: 8}, ""},
		{"QEMU is built without", maint.MoveParams{Compression: "zstd"}, maint.MoveSupport{Capabilities: all.Capabilities, Multifd: []string{"none", "zlib"}}, nil, maint.MoveParams{}, "compression zstd is left out: the guest's QEMU cannot do it"},
		{"QEMU cannot be asked", maint.MoveParams{Compression: "xbzrle"}, maint.MoveSupport{}, errors.New("no"), maint.MoveParams{}, "compression xbzrle is left out: the guest's QEMU could not be asked whether it can do it"},
		{"one connection only", maint.MoveParams{Compression: "xbzrle", Parallel: 4}, all, nil, maint.MoveParams{Parallel: 4}, "compression xbzrle is left out: it is for one connection, and this copy has several"},
		{"zero-copy", maint.MoveParams{ZeroCopy: true}, all, nil, maint.MoveParams{ZeroCopy: true, Parallel: 4}, ""},
		{"zero-copy, and TLS", maint.MoveParams{ZeroCopy: true, TLS: true}, all, nil, maint.MoveParams{TLS: true}, "zero-copy is left out: TLS copies what it encrypts"},
		{"zero-copy, an older QEMU", maint.MoveParams{ZeroCopy: true}, maint.MoveSupport{Capabilities: []string{"multifd"}}, nil, maint.MoveParams{}, "zero-copy is left out: the guest's QEMU cannot do it"},
	} {
		p, without := able(c.p, c.has, c.err)
		if diff := cmp.Diff(c.want, p); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
		if got := strings.Join(without, "; "); got != c.without {
			t.Errorf("%s: says %q, want %q", c.name, got, c.without)
		}
	}
}

// The copy goes where the destination takes it in, by the name that its certificate has;
// what this host is configured with has precedence.
func TestLand(t *testing.T) {
	t.Parallel()
	l := maint.Landing{URI: "tcp://198.51.100.2", Listen: "198.51.100.2", TLSName: "host-b"}
	for _, c := range []struct{ p, want maint.MoveParams }{
		{maint.MoveParams{}, maint.MoveParams{MigrateURI: l.URI, Listen: l.Listen}},
		{maint.MoveParams{TLS: true}, maint.MoveParams{TLS: true, TLSName: "host-b", MigrateURI: l.URI, Listen: l.Listen}},
		{maint.MoveParams{TLS: true, TLSName: "b"}, maint.MoveParams{TLS: true, TLSName: "b", MigrateURI: l.URI, Listen: l.Listen}},
	} {
		if diff := cmp.Diff(c.want, (&Migration{landing: l}).land(c.p)); diff != "" {
			t.Errorf("%+v (-want +got):\n%s", c.p, diff)
		}
	}
	p := maint.MoveParams{MigrateURI: "tcp://b"}
	if diff := cmp.Diff(p, (&Migration{}).land(p)); diff != "" {
		t.Errorf("an older peer changes the way (-want +got):\n%s", diff)
	}
}

// What libvirt knows nothing of is left out, and the guest moves.
func TestLibvirtWithoutCompression(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, x *bench) {
		x.Params.Compression = maint.CompressZstd
		if err := x.Perform(t.Context(), t.Context(), x.page(PhasePerform)); err != nil {
			t.Fatal(err)
		}
		if all := strings.Join(x.notes, "\n"); !strings.Contains(all, "compression and zero-copy are left out") {
			t.Errorf("notes %q", all)
		}
		if g, err := x.b.host.Guest(t.Context(), x.UUID); err != nil || g.State != maint.GuestRunning {
			t.Errorf("on the destination: %+v, %v", g, err)
		}
	})
}

// A host that has no way into the network where the peer takes memory in is found out
// before the copy.
func TestNoWayThere(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, x *bench) {
		x.b.landing = maint.Landing{URI: "tcp://198.51.100.2", Listen: "198.51.100.2"}
		x.Source = cutOff{here{x.a}}
		err := x.Reserve(t.Context(), x.page(PhaseReserve))
		if p := maint.AsProblem(err, "", ""); p.Code != maint.CodeMigrationNetwork || !strings.Contains(p.Reason, "198.51.100.2") {
			t.Errorf("%v", err)
		}
	})
}

type cutOff struct{ here }

func (cutOff) Reaches(netip.Addr) error { return errors.New("network is unreachable") }
