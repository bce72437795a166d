package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"belay/agent/api"
	"belay/agent/journal"
	"belay/agent/maint"
	"belay/vmtests/pki"
)

// patience is far more than anything here takes.
const patience = 20 * time.Second

// host is a folder with what one belayd needs.
type host struct{ dir, config string }

// newHost makes a configuration without peers, on a libvirt that is not there,
// with more lines after it.
func newHost(t *testing.T, more string) host {
	t.Helper()
	dir, err := os.MkdirTemp("", "belayd") // short: a unix socket is in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	h := host{dir, filepath.Join(dir, "belayd.toml")}
	text := strings.NewReplacer("DIR", dir).Replace(`
host = "host-a"
state_dir = "DIR/state"
libvirt.socket = "DIR/no-libvirt-sock"
api.socket = "DIR/sock"
` + more)
	if err := os.WriteFile(h.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return h
}

func (h host) socket() string { return filepath.Join(h.dir, "sock") }

// belayd runs it to its end, which must come by itself.
func belayd(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var out, err strings.Builder
	code = serve(ctx, args, &out, &err)
	if ctx.Err() != nil {
		t.Fatalf("belayd %v went on serving:\n%s", args, &err)
	}
	return code, out.String(), err.String()
}

// Guests are restored also where belayd cannot start: for a configuration that is wrong, or a
// certificate that is not there.
func TestRestoreNeedsNoIdentity(t *testing.T) {
	t.Parallel()
	for name, more := range map[string]string{
		"wrong":          "kexec.dir = \"DIR/memory\"\nfrobnicate = 1\n",
		"no certificate": "kexec.dir = \"DIR/memory\"\n[tls]\nca = \"DIR/ca.pem\"\ncert = \"DIR/cert.pem\"\nkey = \"DIR/key.pem\"\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, more)
			if code, _, stderr := belayd(t, "-config", h.config); code != 2 {
				t.Fatalf("it can start: %d, %s", code, stderr)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond) // it would wait for the memory
			defer cancel()
			var out, stderr strings.Builder
			if code := serve(ctx, []string{"-config", h.config, "-restore"}, &out, &stderr); code != 1 || !strings.Contains(stderr.String(), "no file system is mounted on "+h.dir+"/memory") {
				t.Errorf("%d, %s", code, &stderr)
			}
		})
	}
}

func TestFlags(t *testing.T) {
	t.Parallel()
	h := newHost(t, "")
	absent := filepath.Join(h.dir, "absent.toml")
	for _, c := range []struct {
		args           []string
		code           int
		stdout, stderr string // expressions; "" for nothing at all
	}{
		{[]string{"-version"}, 0, `^belayd devel\n$`, ""},
		{[]string{"-help"}, 0, "", "(?s)-config file.*-version"},
		{[]string{"-config", h.config, "-check"}, 0, `^.*/belayd.toml: ok, host host-a, peers: 0\n$`, ""},
		{[]string{"-frobnicate"}, 2, "", "flag provided but not defined: -frobnicate"},
		{[]string{"-config"}, 2, "", "flag needs an argument: -config"},
		{[]string{"start"}, 2, "", `belayd: unexpected argument "start"`},
		{[]string{"-config", absent}, 2, "", "belayd: cannot read the configuration: open " + absent},
		{[]string{"-config", absent, "-check"}, 2, "", "belayd: cannot read the configuration: open " + absent},
	} {
		code, stdout, stderr := belayd(t, c.args...)
		if code != c.code {
			t.Errorf("%v: exit code %d, want %d", c.args, code, c.code)
		}
		for got, want := range map[string]string{stdout: c.stdout, stderr: c.stderr} {
			if !regexp.MustCompile(want).MatchString(got) || want == "" && got != "" {
				t.Errorf("%v: says %q, want %q", c.args, got, want)
			}
		}
	}
	if _, err := os.Stat(filepath.Join(h.dir, "state")); err == nil {
		t.Error("checking the configuration made the state folder")
	}
}

func TestConfigurationMistakes(t *testing.T) {
	t.Parallel()
	for more, want := range map[string]string{
		"[limits]\nmigration_out = 2":     `belayd.toml:8: there is no setting "limits.migration_out"; did you mean "migrations_out"?`,
		"[migration]\ntimeout = 'soon'":   `belayd.toml:8:11: "soon" is not a duration`,
		"[limits]\nmigrations_in = 99":    "configuration: limits.migrations_in: 99 is not between 1 and 8",
		"[peers.host-b]\naddress = 'b:1'": "configuration: tls.ca: is needed",
	} {
		h := newHost(t, "\n"+more)
		for _, args := range [][]string{{"-config", h.config}, {"-config", h.config, "-check"}} {
			code, stdout, stderr := belayd(t, args...)
			if code != 2 || stdout != "" || !strings.Contains(stderr, want) {
				t.Errorf("%q: exit code %d, says %q, want 2 and %q", more, code, stderr, want)
			}
		}
	}
}

// TestCannotServe is what keeps belayd from starting: exit code 1 or 2, what it is
// and what would lift it, in one line.
func TestCannotServe(t *testing.T) {
	t.Parallel()
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { busy.Close() })
	const tls = "tls = { ca = 'DIR/ca.pem', cert = 'DIR/host-a.pem', key = 'DIR/host-a-key.pem' }\n"
	remove := func(name string) func(*testing.T, host) {
		return func(t *testing.T, h host) {
			certificates(t, h)
			if err := os.Remove(filepath.Join(h.dir, name)); err != nil {
				t.Error(err)
			}
		}
	}
	spoil := func(name string) func(*testing.T, host) {
		return func(t *testing.T, h host) {
			certificates(t, h)
			if err := os.WriteFile(filepath.Join(h.dir, name), []byte("not PEM"), 0o600); err != nil {
				t.Error(err)
			}
		}
	}
	for _, c := range []struct {
		name  string
		more  string
		setup func(*testing.T, host)
		want  string // an expression
	}{
		{"state folder cannot be made", "", func(t *testing.T, h host) {
			replaceIn(t, h.config, h.dir+"/state", "/proc/belay/state")
		}, `cannot open the journal /proc/belay/state/journal.db: mkdir .*\(make the state folder writable for belayd, or set state_dir`},
		{"a file is in the state folder's way", "", func(t *testing.T, h host) {
			if err := os.WriteFile(h.dir+"/state", nil, 0o600); err != nil {
				t.Error(err)
			}
		}, `cannot open the journal DIR/state/journal.db: mkdir DIR/state: not a directory \(make`},
		{"a folder is in the journal's way", "", func(t *testing.T, h host) {
			if err := os.MkdirAll(h.dir+"/state/journal.db", 0o700); err != nil {
				t.Error(err)
			}
		}, `cannot open the journal DIR/state/journal.db: .*is a directory \(make`},
		{"the journal is something else", "", func(t *testing.T, h host) {
			if err := os.Mkdir(h.dir+"/state", 0o700); err != nil {
				t.Error(err)
			}
			if err := os.WriteFile(h.dir+"/state/journal.db", []byte(strings.Repeat("not a journal ", 9999)), 0o600); err != nil {
				t.Error(err)
			}
		}, `cannot open the journal DIR/state/journal.db: .*\(the file is damaged; move it away`},
		{"the state folder is another's", "", func(t *testing.T, h host) {
			j, err := journal.Open(h.dir + "/state")
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(func() { j.Close() })
		}, `cannot open the journal DIR/state/journal.db: it is locked \(another belayd uses this state folder; stop it`},
		{"the socket is another's", "", func(t *testing.T, h host) {
			l, err := net.Listen("unix", h.socket())
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(func() { l.Close() })
		}, `cannot listen on api.socket DIR/sock: another belayd answers there \(stop it`},
		{"the port is another's", "api.listen = '" + busy.Addr().String() + "'\n" + tls, certificates,
			`cannot listen for peers on api.listen 127.0.0.1:\d+: .*address already in use`},
		{"the metrics' port is another's", "api.metrics = '" + busy.Addr().String() + "'", nil,
			`cannot listen for Prometheus on api.metrics 127.0.0.1:\d+: .*address already in use`},
		{"the page's port is another's", "page.listen = '" + busy.Addr().String() + "'", nil,
			`cannot listen for browsers on page.listen 127.0.0.1:\d+: .*address already in use`},
		{"absent CA", tls, remove("ca.pem"), `cannot read tls.ca: open DIR/ca.pem: no such file or directory \(put a PEM file there`},
		{"bad CA", tls, spoil("ca.pem"), `cannot read tls.ca: DIR/ca.pem has no certificate \(put`},
		{"absent certificate", tls, remove("host-a.pem"), `cannot read tls.cert DIR/host-a.pem and tls.key DIR/host-a-key.pem: open DIR/host-a.pem: no such file`},
		{"bad certificate", tls, spoil("host-a.pem"), `cannot read tls.cert DIR/host-a.pem and tls.key DIR/host-a-key.pem: .*PEM`},
		{"absent key", tls, remove("host-a-key.pem"), `cannot read tls.cert DIR/host-a.pem and tls.key DIR/host-a-key.pem: open DIR/host-a-key.pem: no such file`},
		{"bad key", tls, spoil("host-a-key.pem"), `cannot read tls.cert DIR/host-a.pem and tls.key DIR/host-a-key.pem: .*PEM`},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, c.more)
			if c.setup != nil {
				c.setup(t, h)
			}
			code, _, stderr := belayd(t, "-config", h.config)
			want := "belayd: " + strings.ReplaceAll(c.want, "DIR", regexp.QuoteMeta(h.dir))
			exit := 1
			if strings.HasPrefix(c.want, "cannot read tls.") { // a wrong setting: no restart mends it
				exit = 2
			}
			if code != exit || !regexp.MustCompile("(?m)^"+want).MatchString(stderr) {
				t.Errorf("exit code %d, says\n%swant %d and\n%s", code, stderr, exit, want)
			}
		})
	}
}

// certificates puts a CA and the host's own certificate into its folder.
func certificates(t *testing.T, h host) {
	ca, err := pki.New(h.dir, "hosts under test")
	if err == nil {
		err = ca.IssueHost("host-a")
	}
	if err != nil {
		t.Error(err)
	}
}

func replaceIn(t *testing.T, file, old, new string) {
	b, err := os.ReadFile(file)
	if err == nil {
		err = os.WriteFile(file, []byte(strings.Replace(string(b), old, new, 1)), 0o600)
	}
	if err != nil {
		t.Error(err)
	}
}

// systemd is the other end of sd_notify(3).
func systemd(t *testing.T, h host) <-chan string {
	t.Helper()
	path := filepath.Join(h.dir, "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "60000") // it is fed thrice in this time
	t.Setenv("WATCHDOG_PID", fmt.Sprint(os.Getpid()))
	told := make(chan string, 10000)
	go func() {
		defer close(told)
		b := make([]byte, 4096)
		for {
			n, err := c.Read(b)
			if err != nil {
				return
			}
			told <- string(b[:n])
		}
	}()
	return told
}

// hears waits for a message that begins so.
func hears(t *testing.T, told <-chan string, want string) string {
	t.Helper()
	late := time.After(patience)
	var heard []string
	for {
		select {
		case m := <-told:
			if strings.HasPrefix(m, want) {
				return m
			}
			heard = append(heard, m)
		case <-late:
			t.Fatalf("systemd is not told %s, only %q", want, heard)
		}
	}
}

// freePort is an address that nobody listens on.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func get(t *testing.T, url string) string {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// TestServesWithoutLibvirt is belayd's life under systemd, on a host whose
// libvirt is down.
func TestServesWithoutLibvirt(t *testing.T) { // not parallel: it sets the environment
	metrics, browsers := freePort(t), freePort(t)
	h := newHost(t, "api.metrics = '"+metrics+"'\npage.listen = '"+browsers+"'")
	told := systemd(t, h)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var stderr syncWriter
	exited := make(chan int, 1)
	go func() { exited <- serve(ctx, []string{"-config", h.config}, io.Discard, &stderr) }()

	if m := hears(t, told, ""); m != "READY=1" {
		t.Errorf("systemd is told %q first", m)
	}
	hears(t, told, "WATCHDOG=1")
	if m := hears(t, told, "STATUS="); m != "STATUS=0 operations, 1 conditions" {
		t.Errorf("systemd is told %q", m)
	}
	hears(t, told, "WATCHDOG=1") // and again

	client := api.NewUnix(h.socket())
	defer client.Close()
	asking, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		s, err := client.Status(asking)
		if err != nil {
			t.Fatal(err)
		}
		if s.Host.Name != "host-a" || len(s.Conditions) != 1 || s.Conditions[0].Code != maint.CodeHypervisorDown || s.Conditions[0].Remedy == "" {
			t.Fatalf("the status is %+v", s)
		}
		// Until libvirt has been asked for the first time it says so.
		if strings.Contains(s.Conditions[0].Text, filepath.Join(h.dir, "no-libvirt-sock")) {
			break
		}
	}
	if inv, err := client.Inventory(asking); err != nil || inv.Stale == "" {
		t.Errorf("the inventory is %+v, %v", inv, err)
	}

	page := get(t, "http://"+metrics+"/metrics")
	for _, want := range []string{`belay_build_info{version="devel"} 1`, "belay_libvirt_up 0", "belay_journal_writable 1",
		"belay_operations_running 0", "belay_reservations 0", `belay_conditions{code="libvirt-unreachable"} 1`, `belay_operations_total{kind="hold",outcome="stuck"} 0`, "belay_migration_downtime_seconds_count 0"} {
		if !strings.Contains(page, "\n"+want+"\n") {
			t.Errorf("the metrics do not have %s:\n%s", want, page)
		}
	}
	page = get(t, "http://"+browsers+"/")
	for _, want := range []string{"<h1>host-a</h1>", "libvirt cannot be asked: ", `<td class="bad">fail</td>`} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not have %s:\n%s", want, page)
		}
	}

	// A second one with another state folder does not take the socket away.
	second := newHost(t, "")
	replaceIn(t, second.config, second.socket(), h.socket())
	if code, _, stderr := belayd(t, "-config", second.config); code != 1 || !strings.Contains(stderr, "another belayd answers there") {
		t.Errorf("a second belayd exits with %d: %s", code, stderr)
	}
	if _, err := client.Status(asking); err != nil {
		t.Errorf("after that the first one does not answer: %v", err)
	}

	stop()
	select {
	case code := <-exited:
		if code != 0 {
			t.Errorf("exit code %d:\n%s", code, &stderr)
		}
	case <-time.After(patience):
		t.Fatal("it does not stop")
	}
	hears(t, told, "STOPPING=1")
	if _, err := client.Status(asking); err == nil {
		t.Error("it has stopped, and still answers")
	}
	if !strings.Contains(stderr.String(), `msg="belayd serves"`) || !strings.Contains(stderr.String(), `msg="shutting down"`) {
		t.Errorf("the log is\n%s", &stderr)
	}
	// What it leaves behind is no obstacle to the next one.
	j, err := journal.Open(filepath.Join(h.dir, "state"))
	if err != nil {
		t.Fatal(err)
	}
	j.Close()
}

// TestGivesWay: what a reload of the unit does.
func TestGivesWay(t *testing.T) { // not parallel: the signal is for the process
	h := newHost(t, "")
	told := systemd(t, h)
	var stderr syncWriter
	exited := make(chan int, 1)
	go func() { exited <- serve(t.Context(), []string{"-config", h.config}, io.Discard, &stderr) }()
	hears(t, told, "READY=1")
	if err := syscall.Kill(os.Getpid(), syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	select {
	case code := <-exited:
		if code != exitAgain {
			t.Errorf("exit code %d:\n%s", code, &stderr)
		}
	case <-time.After(patience):
		t.Fatalf("it does not give way:\n%s", &stderr)
	}
	hears(t, told, "STOPPING=1")
	if strings.Contains(stderr.String(), "level=ERROR") || strings.Contains(stderr.String(), "belayd: ") {
		t.Errorf("it complains:\n%s", &stderr)
	}
}

// TestJournaldHasTheTime: where journald adds the time, it is not logged twice.
func TestJournaldHasTheTime(t *testing.T) { // not parallel: it sets the environment
	for stream, timed := range map[string]bool{"": true, "8:1234": false} {
		t.Setenv("JOURNAL_STREAM", stream)
		var b strings.Builder
		log := newLog(&b, false)
		log.Info("hello", "op", "mig-1")
		log.Debug("nobody wants to know")
		if strings.Contains(b.String(), "time=") != timed || !strings.HasSuffix(b.String(), "level=INFO msg=hello op=mig-1\n") {
			t.Errorf("JOURNAL_STREAM=%q: %s", stream, b.String())
		}
	}
}

// syncWriter is a log that can be read while it is written.
type syncWriter struct {
	mu sync.Mutex
	b  strings.Builder
}

func (w *syncWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.Write(b)
}

func (w *syncWriter) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.String()
}
