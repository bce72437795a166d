package api

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/vmtests/pki"
)

// nobody is a user that every system has, and that is in one group.
func nobody(t *testing.T) (name, group string) {
	t.Helper()
	u, err := user.LookupId("65534")
	if err != nil {
		t.Skip("there is no user 65534 to be:", err)
	}
	g, err := user.LookupGroupId(u.Gid)
	if err != nil {
		t.Skip("user 65534 has no group:", err)
	}
	return u.Username, g.Name
}

func TestLocalUsers(t *testing.T) {
	t.Parallel()
	name, group := nobody(t)
	const operator, viewer, none = maint.RoleOperator, maint.RoleViewer, maint.RoleNone
	for _, c := range []struct {
		name               string
		operators, viewers []string
		uid                uint32
		want               Caller
	}{
		{"root needs no list", nil, nil, 0, Caller{"root", operator}},
		{"root is no mere viewer", nil, []string{"root", "*"}, 0, Caller{"root", operator}},
		{"on no list", nil, nil, 65534, Caller{name, none}},
		{"operator by name", []string{"ada", name}, nil, 65534, Caller{name, operator}},
		{"operator by group", []string{"@" + group}, nil, 65534, Caller{name, operator}},
		{"viewer by name", nil, []string{name}, 65534, Caller{name, viewer}},
		{"viewer by group", []string{"@root"}, []string{"@" + group}, 65534, Caller{name, viewer}},
		{"everybody views", []string{"root"}, []string{"*"}, 65534, Caller{name, viewer}},
		{"operator before viewer", []string{name}, []string{"*"}, 65534, Caller{name, operator}},
		{"a group is no user", []string{"@" + name + "x", group + "x", "root", "@root"}, nil, 65534, Caller{name, none}},
		{"unknown to the system", []string{"uid:4000000000"}, []string{"*"}, 4000000000, Caller{"uid:4000000000", viewer}},
		{"unknown and unlisted", []string{"ada"}, []string{"@ada"}, 4000000000, Caller{"uid:4000000000", none}},
	} {
		if got := (Access{Operators: c.operators, Viewers: c.viewers}).local(c.uid); got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
}

// TestPeerCredentials connects as root and as nobody: the kernel says who
// calls, whatever the caller says.
func TestPeerCredentials(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to be somebody else")
	}
	name, _ := nobody(t)
	f := &fakeAgent{}
	socket := serveUnix(t, f, Access{Operators: []string{"@nobody-is-in-here"}, Viewers: []string{name}})

	root := NewUnix(socket)
	defer root.Close()
	if op, err := root.Migrate(t.Context(), maint.MigrateRequest{Guest: "web-1", To: "host-b"}); err != nil || op.By != "root" {
		t.Errorf("root's operation is by %q, %v", op.By, err)
	}

	other := NewUnix(socket)
	defer other.Close()
	other.http.Transport = &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
		return dialAs(65534, socket)
	}}
	if _, err := other.Status(t.Context()); err != nil {
		t.Errorf("a viewer cannot view: %v", err)
	}
	f.taken()
	_, err := other.Migrate(t.Context(), maint.MigrateRequest{Guest: "web-1", To: "host-b"})
	if p := problemOf(t, err); p.Code != maint.CodeForbidden || p.Subject != "caller "+name {
		t.Errorf("a viewer's migration: %+v", p)
	}
	if calls := f.taken(); len(calls) > 0 {
		t.Errorf("a viewer made the agent do %v", calls)
	}
}

// dialAs connects with another effective user. Only this thread has it, which
// the raw system call sees to.
func dialAs(uid int, socket string) (net.Conn, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	keep := ^uintptr(0)
	set := func(euid int) error {
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, keep, uintptr(euid), keep); errno != 0 {
			return errno
		}
		return nil
	}
	if err := set(uid); err != nil {
		return nil, err
	}
	c, err := net.Dial("unix", socket)
	return c, errors.Join(err, set(0))
}

// TestNotFromASocket: a request without a connection to ask has no role.
func TestNotFromASocket(t *testing.T) {
	t.Parallel()
	everybody := Access{Operators: []string{"*"}, OperatorCerts: []string{""}}
	for _, id := range []Identify{everybody.Unix, everybody.TLS} {
		w := ask(Handler(&fakeAgent{}, id, quiet), "GET", "/v1/status", "")
		if p := refused(t, w, http.StatusForbidden); p.Code != maint.CodeForbidden {
			t.Errorf("%+v", p)
		}
	}
}

// certs makes a CA that has issued certificates for hosts and people.
func certs(t *testing.T, people ...string) pki.CA {
	t.Helper()
	ca, err := pki.New(t.TempDir(), "hosts under test")
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"host-a", "host-b"} {
		if err := ca.IssueHost(host); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range people {
		if err := ca.IssueClient(p); err != nil {
			t.Fatal(err)
		}
	}
	return ca
}

func identity(t *testing.T, ca pki.CA, name string) Identity {
	t.Helper()
	id, err := LoadIdentity(ca.CertFile("ca"), ca.CertFile(name), ca.KeyFile(name))
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func clientAs(t *testing.T, address string, c *tls.Config) *Client {
	c = c.Clone()
	if c.ServerName == "" {
		c.ServerName = "host-a"
	}
	client := NewTLS("host-a", address, c)
	t.Cleanup(client.Close)
	return client
}

func TestCertificates(t *testing.T) {
	t.Parallel()
	ca := certs(t, "ops", "eyes", "stranger")
	other := certs(t, "ops")
	f := &fakeAgent{}
	address := serveTLS(t, f, Access{OperatorCerts: []string{"ops"}, ViewerCerts: []string{"eyes"}, PeerCerts: []string{"host-b"}},
		identity(t, ca, "host-a"))

	for _, c := range []struct {
		name                string
		view, operate, peer bool
	}{
		{"ops", true, true, false},
		{"eyes", true, false, false},
		{"host-b", false, false, true},
		{"host-a", false, false, false}, // a host's certificate, and not on any list
		{"stranger", false, false, false},
	} {
		client := clientAs(t, address, identity(t, ca, c.name).Client)
		check := func(what string, may bool, err error) {
			t.Helper()
			if may && err != nil {
				t.Errorf("%s may not %s: %v", c.name, what, err)
			}
			if !may && problemOf(t, err).Code != maint.CodeForbidden {
				t.Errorf("%s may %s, or fails for another reason: %v", c.name, what, err)
			}
		}
		_, err := client.Status(t.Context())
		check("view", c.view, err)
		op, err := client.Migrate(t.Context(), maint.MigrateRequest{Guest: "web-1", To: "host-b"})
		check("operate", c.operate, err)
		if c.operate && op.By != "cert:"+c.name {
			t.Errorf("%s is known as %q", c.name, op.By)
		}
		f.taken()
		err = client.Release(t.Context(), "mig-1")
		check("be a peer", c.peer, err)
		if calls := f.taken(); c.peer && (len(calls) != 1 || calls[0] != "Release mig-1 "+c.name) {
			t.Errorf("%s is known as in %v", c.name, calls)
		}
	}

	// Those that do not get as far as being asked who they are.
	trusting := &tls.Config{RootCAs: identity(t, ca, "ops").Client.RootCAs, MinVersion: tls.VersionTLS13}
	foreign := identity(t, other, "ops").Client.Clone()
	foreign.RootCAs = trusting.RootCAs
	old := identity(t, ca, "ops").Client.Clone()
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	wrongName := identity(t, ca, "ops").Client.Clone()
	wrongName.ServerName = "host-b"
	for name, c := range map[string]*tls.Config{
		"no certificate":            trusting,
		"certificate of another CA": foreign,
		"trusting another CA":       identity(t, other, "ops").Client,
		"TLS 1.2":                   old,
		"expecting another host":    wrongName,
	} {
		f.taken()
		_, err := clientAs(t, address, c).Status(t.Context())
		p := problemOf(t, err)
		if p.Code != maint.CodePeerDown || !errors.Is(err, maint.ErrPeerDown) || !strings.Contains(p.Remedy, "trust the same CA") {
			t.Errorf("%s: %+v", name, p)
		}
		if calls := f.taken(); len(calls) > 0 {
			t.Errorf("%s: the agent was asked for %v", name, calls)
		}
	}
}

// TestPlainHTTPToTLS: what is not TLS is answered nothing of the API.
func TestPlainHTTPToTLS(t *testing.T) {
	t.Parallel()
	f := &fakeAgent{}
	address := serveTLS(t, f, Access{}, identity(t, certs(t), "host-a"))
	resp, err := http.Get("http://" + address + "/v1/status")
	if err == nil {
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != http.StatusBadRequest {
			t.Errorf("answered %s: %s", resp.Status, b)
		}
	}
	if calls := f.taken(); len(calls) > 0 {
		t.Errorf("the agent was asked for %v", calls)
	}
}

// TestRenewedCertificate: new files count from the next handshake on, on both
// sides.
func TestRenewedCertificate(t *testing.T) {
	t.Parallel()
	ca := certs(t, "old", "new")
	address := serveTLS(t, &fakeAgent{}, Access{OperatorCerts: []string{"new"}}, identity(t, ca, "host-a"))
	client := clientAs(t, address, identity(t, ca, "old").Client)
	if _, err := client.Status(t.Context()); problemOf(t, err).Code != maint.CodeForbidden {
		t.Fatal(err)
	}
	for from, to := range map[string]string{ca.CertFile("new"): ca.CertFile("old"), ca.KeyFile("new"): ca.KeyFile("old")} {
		b, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(to, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	client.Close() // of the idle connection; the next call makes another
	if _, err := client.Status(t.Context()); err != nil {
		t.Errorf("the renewed certificate is not in use: %v", err)
	}
}

func TestLoadIdentity(t *testing.T) {
	t.Parallel()
	ca := certs(t)
	empty := filepath.Join(t.TempDir(), "empty.pem")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	absent := filepath.Join(t.TempDir(), "absent.pem")
	root, cert, key := ca.CertFile("ca"), ca.CertFile("host-a"), ca.KeyFile("host-a")
	for _, c := range []struct {
		name, ca, cert, key string
		want                string
		notExist            bool
	}{
		{"absent CA", absent, cert, key, "cannot read tls.ca: open " + absent, true},
		{"empty CA", empty, cert, key, "cannot read tls.ca: " + empty + " has no certificate", false},
		{"absent certificate", root, absent, key, "cannot read tls.cert " + absent + " and tls.key " + key + ": open " + absent, true},
		{"absent key", root, cert, absent, "cannot read tls.cert " + cert + " and tls.key " + absent + ": open " + absent, true},
		{"empty key", root, cert, empty, "cannot read tls.cert " + cert + " and tls.key " + empty + ": ", false},
		{"key of another", root, cert, ca.KeyFile("host-b"), "cannot read tls.cert " + cert + " and tls.key " + ca.KeyFile("host-b") + ": ", false},
	} {
		_, err := LoadIdentity(c.ca, c.cert, c.key)
		if err == nil || !strings.HasPrefix(err.Error(), c.want) || errors.Is(err, fs.ErrNotExist) != c.notExist {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if id, err := LoadIdentity("", "", ""); err != nil || id.Client == nil {
		t.Errorf("a host without peers has no identity: %v", err)
	}
}
