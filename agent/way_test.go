package agent_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"belay/agent/agenttest"
	"belay/agent/config"
	"belay/agent/maint"
	"belay/vmtests/pki"
)

// A host that demands TLS takes no guest in without, and sends none without, whatever the
// other one is content with.
func TestTLSIsForced(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		edit func(*config.Config)
		want []maint.Code
		says string
	}{
		{"neither", func(*config.Config) {}, nil, ""},
		{"the destination", func(c *config.Config) { c.Migration.TLS = c.Host == "b" }, []maint.Code{maint.CodeTLS}, "the source would send it without"},
		{"the source", func(c *config.Config) { c.Migration.TLS = c.Host == "a" }, []maint.Code{maint.CodeTLS, maint.CodeCertificate}, "in the clear"},
		{"by ssh", func(c *config.Config) {
			c.Migration.TLS = c.Host == "a"
			for name, p := range c.Peers {
				p.LibvirtURI = strings.Replace(p.LibvirtURI, "qemu+tcp", "qemu+ssh", 1)
				c.Peers[name] = p
			}
		}, []maint.Code{maint.CodeCertificate}, "/etc/pki/qemu/server-cert.pem is not there"},
	} {
		w := agenttest.New(t, quiet(t), c.edit, "a", "b")
		w.Nodes[0].Host.PutGuest("web-1")
		vs, err := w.Nodes[0].Client.Moves(ctxFor(t, patience), "web-1", "b")
		if err != nil {
			t.Fatal(err)
		}
		if got := codesOf(vs[0]); !slices.Equal(got, c.want) || c.says != "" && !slices.ContainsFunc(vs[0].Problems, func(p maint.Problem) bool { return strings.Contains(p.Reason, c.says) }) {
			t.Errorf("%s: %+v", c.name, vs[0].Problems)
		}
	}
}

// With certificates in their places guests move by TLS, by the name that the destination's
// certificate has.
func TestMoveByTLS(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), func(c *config.Config) {
		c.Migration.TLS = true
		for name, p := range c.Peers {
			p.LibvirtURI = "qemu+ssh://" + name + "/system"
			c.Peers[name] = p
		}
	}, "a", "b")
	a, b := w.Nodes[0], w.Nodes[1]
	a.Host.PutGuest("web-1")
	ca, err := pki.New(t.TempDir(), "qemu")
	if err == nil {
		err = ca.IssueHost("b.qemu")
	}
	if err != nil {
		t.Fatal(err)
	}
	if c := doctor(t, b, "migration TLS, incoming"); c.Result != maint.CheckFail || !strings.Contains(c.Text, "/etc/pki/qemu/server-cert.pem is not there") {
		t.Errorf("without a certificate: %+v", c)
	}
	for from, to := range map[string]string{ca.CertFile("ca"): "ca-cert.pem", ca.CertFile("b.qemu"): "server-cert.pem", ca.KeyFile("b.qemu"): "server-key.pem"} {
		text, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		put(t, filepath.Join(b.Root, "etc/pki/qemu", to), string(text))
	}
	if c := doctor(t, b, "migration TLS, incoming"); c.Result != maint.CheckOK || !strings.Contains(c.Text, "b.qemu") {
		t.Errorf("with a certificate: %+v", c)
	}
	if c := doctor(t, b, "migration TLS forced"); c.Result != maint.CheckWarn {
		t.Errorf("libvirt does not force it: %+v", c)
	}
	put(t, filepath.Join(b.Root, "etc/libvirt/qemu.conf"), "migrate_tls_force = 1\n")
	if c := doctor(t, b, "migration TLS forced"); c.Result != maint.CheckOK {
		t.Errorf("libvirt forces it: %+v", c)
	}
	id := begin(t, a, maint.MigrateRequest{Guest: "web-1", To: "b"})
	if op := await(t, ctxFor(t, patience), a, id); op.Outcome != maint.OutcomeDone {
		t.Fatalf("%+v", op)
	}
	if p := b.Host.CameBy(); !p.TLS || p.TLSName != "b.qemu" {
		t.Errorf("it came by %+v", p)
	}
}

// doctor is what the doctor says of one thing.
func doctor(t *testing.T, n *agenttest.Node, name string) maint.Check {
	t.Helper()
	all, err := n.Client.Doctor(ctxFor(t, patience))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range all {
		if c.Name == name {
			return c
		}
	}
	t.Fatalf("the doctor says nothing of %s: %+v", name, all)
	return maint.Check{}
}
