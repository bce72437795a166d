package local

import (
	"crypto/tls"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/vmtests/pki"
)

// authority is a CA that issues to "host-b" for 127.0.0.1.
func authority(t *testing.T) pki.CA {
	t.Helper()
	ca, err := pki.New(t.TempDir(), "test")
	if err == nil {
		err = ca.IssueHost("host-b", net.IPv4(127, 0, 0, 1))
	}
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

// install puts what a CA has issued to name where it is looked for.
func install(t *testing.T, root string, ca pki.CA, name string, to map[string]string) {
	t.Helper()
	for what, path := range to {
		from := map[string]string{"ca": ca.CertFile("ca"), "cert": ca.CertFile(name), "key": ca.KeyFile(name)}[what]
		text, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		put(t, root, path, string(text))
	}
}

func TestQEMUConf(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	h := New(root, root)
	if w := h.Wiring(); w.First != 49152 || w.Last != 49215 || w.Server.File != "/etc/pki/qemu/server-cert.pem" || h.ForcesTLS() {
		t.Errorf("without a file: %+v", w)
	}
	put(t, root, "etc/pki/libvirt-migrate/ca-cert.pem", "")
	if w := h.Wiring(); w.Server.File != "/etc/pki/libvirt-migrate/server-cert.pem" {
		t.Errorf("with libvirt's own folder: %+v", w)
	}
	put(t, root, "etc/libvirt/qemu.conf", `
# migration_port_max = 1
  migration_port_min = 50000 # low
migration_port_max=50010
migrate_tls_force = 1
migrate_tls_x509_cert_dir = "/srv/pki # mine"
`)
	if w := h.Wiring(); w.First != 50000 || w.Last != 50010 || w.Server.File != "/srv/pki # mine/server-cert.pem" || !h.ForcesTLS() {
		t.Errorf("with a file: %+v", w)
	}
}

func TestCertificate(t *testing.T) {
	t.Parallel()
	ca := authority(t)
	qemu := map[string]string{"ca": "etc/pki/qemu/ca-cert.pem", "cert": "etc/pki/qemu/server-cert.pem", "key": "etc/pki/qemu/server-key.pem"}
	for _, c := range []struct {
		name  string
		spoil func(t *testing.T, root string, h *Host)
		says  string
	}{
		{"good", func(*testing.T, string, *Host) {}, ""},
		{"expired", func(_ *testing.T, _ string, h *Host) {
			h.now = func() time.Time { return time.Now().Add(400 * 24 * time.Hour) }
		}, "expired at"},
		{"not yet", func(_ *testing.T, _ string, h *Host) {
			h.now = func() time.Time { return time.Now().Add(-2 * time.Hour) }
		}, "is not valid before"},
		{"not there", func(t *testing.T, root string, _ *Host) { unput(t, root, qemu["cert"]) }, "is not there"},
		{"without its key", func(t *testing.T, root string, _ *Host) { unput(t, root, qemu["key"]) }, "comes without its key, /etc/pki/qemu/server-key.pem"},
		{"without a CA", func(t *testing.T, root string, _ *Host) { unput(t, root, qemu["ca"]) }, "comes without its CA's"},
		{"of another CA", func(t *testing.T, root string, _ *Host) {
			install(t, root, authority(t), "host-b", map[string]string{"ca": qemu["ca"]})
		}, "was not issued by the CA in /etc/pki/qemu/ca-cert.pem"},
		{"no certificate", func(t *testing.T, root string, _ *Host) { put(t, root, qemu["cert"], "nonsense") }, "none that can be read"},
	} {
		root := t.TempDir()
		h := New(root, root)
		install(t, root, ca, "host-b", qemu)
		c.spoil(t, root, h)
		got := h.Wiring().Server
		if c.says == "" && got.Fault != "" || !strings.Contains(got.Fault, c.says) || (got.Fault != "") != (got.Remedy != "") {
			t.Errorf("%s: %+v", c.name, got)
		}
		if trusted := h.Trusts(); c.name == "good" && !slices.Equal(got.Issuers, trusted) {
			t.Errorf("it is issued by %v, trusted are %v", got.Issuers, trusted)
		}
		if c.name == "good" && (!got.IsFor("host-b") || !got.IsFor("127.0.0.1") || got.IsFor("host-c")) {
			t.Errorf("it is for %v", got.Names())
		}
	}
	if c := New(t.TempDir(), "").Client(); c.Fault != "" {
		t.Errorf("a client needs no certificate: %+v", c)
	}
}

func unput(t *testing.T, root, path string) {
	t.Helper()
	if err := os.Remove(filepath.Join(root, path)); err != nil {
		t.Fatal(err)
	}
}

// libvirtd answers TLS as libvirt's does: it says one byte to whoever it accepts.
func libvirtd(t *testing.T, ca pki.CA, name string, says []byte) string {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(ca.CertFile(name), ca.KeyFile(name))
	if err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAnyClientCert})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Write(says) // also shakes hands; whoever has gone is told nothing
			conn.Close()
		}
	}()
	return "qemu+tls://" + l.Addr().String() + "/system"
}

func TestGreetLibvirt(t *testing.T) {
	t.Parallel()
	ca, other := authority(t), authority(t)
	if err := ca.IssueHostUntil(time.Now().Add(-time.Hour), "late", net.IPv4(127, 0, 0, 1)); err != nil {
		t.Fatal(err)
	}
	if err := ca.IssueHost("elsewhere", net.IPv4(192, 0, 2, 9)); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0") // somebody who says nothing of TLS
	if err != nil {
		t.Fatal(err)
	}
	nobody := "qemu+tls://" + l.Addr().String() + "/system"
	l.Close()
	client := map[string]string{"ca": "etc/pki/CA/cacert.pem", "cert": "etc/pki/libvirt/clientcert.pem", "key": "etc/pki/libvirt/private/clientkey.pem"}
	for _, c := range []struct {
		name, uri string
		code      maint.Code
		says      string
	}{
		{"good", libvirtd(t, ca, "host-b", []byte{1}), "", ""},
		{"not of TLS", "qemu+tcp://127.0.0.1:1/system", "", ""},
		{"nobody listens", nobody, maint.CodePeerDown, "cannot be reached"},
		{"we are not accepted", libvirtd(t, ca, "host-b", nil), maint.CodeCertificate, "does not accept this host's certificate /etc/pki/libvirt/clientcert.pem"},
		{"theirs has expired", libvirtd(t, ca, "late", []byte{1}), maint.CodeCertificate, "the certificate of its libvirt expired at"},
		{"theirs is of another CA", libvirtd(t, other, "host-b", []byte{1}), maint.CodeCertificate, "was not issued by the CA in /etc/pki/CA/cacert.pem"},
		{"theirs is another's", libvirtd(t, ca, "elsewhere", []byte{1}), maint.CodeCertificate, "is for elsewhere, 192.0.2.9, and not for 127.0.0.1"},
		{"which is not looked at", libvirtd(t, ca, "elsewhere", []byte{1}) + "?no_verify=1", "", ""},
	} {
		root := t.TempDir()
		h := New(root, root)
		install(t, root, ca, "host-b", client)
		_, p := h.GreetLibvirt(t.Context(), "host-a", "host-b", c.uri)
		switch {
		case p == nil && c.code == "":
		case p == nil || p.Code != c.code || p.Remedy == "" || !strings.Contains(p.Reason, c.says):
			t.Errorf("%s: %+v", c.name, p)
		}
	}
	root := t.TempDir()
	if ps := New(root, root).CheckWay(t.Context(), "host-a", "host-b", maint.MoveParams{DestURI: "qemu+tls://127.0.0.1/system", TLS: true}); len(ps) != 1 || !strings.Contains(ps[0].Reason, "/etc/pki/libvirt/clientcert.pem, by which host-b knows this host, is not there") {
		t.Errorf("without certificates: %+v", ps)
	}
}

func TestReaches(t *testing.T) {
	t.Parallel()
	h := New("", "")
	if err := h.Reaches(netip.MustParseAddr("127.0.0.1")); err != nil {
		t.Error(err)
	}
	if err := h.Reaches(netip.MustParseAddr("100::1")); err == nil { // discard-only (RFC 6666)
		t.Skip("this machine has a route to everywhere")
	}
}
