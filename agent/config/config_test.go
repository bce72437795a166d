package config

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"belay/agent/maint"
)

// files writes a configuration into a fresh folder and returns its main file,
// belayd.toml; names are paths relative to it.
func files(t *testing.T, texts map[string]string) (main string) {
	t.Helper()
	dir := t.TempDir()
	for name, text := range texts {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, "belayd.toml")
}

// one is a configuration of one file.
func one(t *testing.T, text string) (main string) {
	t.Helper()
	return files(t, map[string]string{"belayd.toml": text})
}

// tlsFiles is what every configuration with peers needs.
const tlsFiles = "[tls]\nca='/ca'\ncert='/cert'\nkey='/key'\n"

func TestDefaults(t *testing.T) {
	t.Parallel()
	hostname, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	got, err := Load(one(t, ""))
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		Host: hostname, StateDir: "/var/lib/belay", RunDir: "/run/belay",
		API:       API{Socket: "/run/belay/belayd.sock"},
		Access:    Access{Operators: []string{"@libvirt", "@belay"}, Viewers: []string{"*"}},
		Libvirt:   Libvirt{URI: "qemu:///system", StateDir: "/var/lib/libvirt/qemu"},
		Limits:    Limits{MemoryReserve: Size{512 << 20}, MigrationsOut: 4, MigrationsIn: 4},
		Migration: Migration{Timeout: Duration{30 * time.Minute}, MaxPause: Duration{300 * time.Millisecond}, CopyDisks: "none"},
		Hold: Hold{MaxPause: Duration{10 * time.Second}, MaxPauseLimit: Duration{5 * time.Minute},
			LeashSilence: Duration{3 * time.Second}, CommandsBy: "root"},
		Events: Events{Policy: "all"},
		Kexec:  Kexec{Dir: "/var/lib/belay/memory", InPlace: true},
		Patch: Patch{Keys: "/etc/belay/keys", Helper: "/run/belay/kernel.sock", AutoLoad: true, Soak: Duration{30 * time.Second}, HealthTimeout: Duration{30 * time.Second},
			Components: []string{"libvirtd.service", "virtqemud.service", "virtlogd.service", "prometheus-node-exporter.service", "belayd.service"}},
		Journal: Journal{Keep: Duration{90 * 24 * time.Hour}},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestEverySetting(t *testing.T) {
	t.Parallel()
	got, err := Load(one(t, `
host = "host-a"
state_dir = "/state"
run_dir = "/run/b"
[api]
socket = "/sock"
listen = "[::]:7443"
metrics = "127.0.0.1:9100"
[page]
listen = "[::1]:9478"
[tls]
ca = "/ca.pem"
cert = "/cert.pem"
key = "/key.pem"
[access]
operators = ["ada", "@ops"]
viewers = ["*", "eyes"]
operator_certs = ["ops-laptop"]
viewer_certs = ["wall"]
[libvirt]
socket = "/run/libvirt/virtqemud-sock"
uri = "qemu:///session"
state_dir = "/qemu"
[limits]
guest_memory = "64GiB"
memory_reserve = "1 TiB"
migrations_out = 1
migrations_in = 8
[migration]
timeout = "1h30m"
bandwidth_mib_s = 500
max_pause = "1s"
allow = ["parallel", "slow"]
copy_disks = "all"
tls = true
address = "198.51.100.1"
compression = "zstd"
[hold]
max_pause = "5s"
max_pause_limit = "30s"
leash_silence = "2s"
kill_libvirt = "4s"
commands_by = "operators"
leash = "/usr/libexec/leash"
[events]
enabled = true
policy = "any"
wake = "/etc/belay/wake"
upstream = "http://127.0.0.1:8775"
imds_v1 = true
ec2_shows_freeze = true
[events.notice]
Freeze = "20m"
[patch]
keys = "/keys"
helper = ""
auto_load = false
soak = "1m"
health = ["/bin/healthy", "-q"]
health_timeout = "5s"
components = ["libvirtd.service"]
[kexec]
dir = "/memory"
cold_start = true
in_place = false
[policy]
max_pause = "20s"
refuse = ["B3"]
[[policy.guests]]
names = ["shop-*"]
max_pause = "2s"
max_blackout = "500ms"
refuse = []
prefer = ["D"]
ask = ["B"]
notice = "24h"
security_notice = "1h"
anti_affinity = ["shop"]
priority = 10
owner = "shop"
windows = [{rule = "FREQ=DAILY;BYHOUR=2", zone = "Europe/Berlin", length = "3h", from = "2026-12-01", except = ["2026-12-24"]}]
[anti_affinity]
db = ["db-*"]
[events.owners.shop]
guests = ["shop-*"]
[[events.windows]]
guests = ["shop-*"]
rule = "FREQ=DAILY;BYHOUR=2"
zone = "Europe/Berlin"
length = "3h"
from = "2026-12-01"
except = ["2026-12-24"]
[journal]
keep = "24h"
[peers.host-b]
address = "192.0.2.2:7443"
libvirt_uri = "qemu+tls://host-b/system"
migrate_uri = "tcp://192.0.2.2"
[peers.host-c]
address = "host-c:7443"
cert_name = "c.example.net"
libvirt_uri = "qemu+ssh://root@host-c/system"
`))
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		Host: "host-a", StateDir: "/state", RunDir: "/run/b",
		API:  API{Socket: "/sock", Listen: "[::]:7443", Metrics: "127.0.0.1:9100"},
		Page: Page{Listen: "[::1]:9478"},
		TLS:  TLS{CA: "/ca.pem", Cert: "/cert.pem", Key: "/key.pem"},
		Access: Access{Operators: []string{"ada", "@ops"}, Viewers: []string{"*", "eyes"},
			OperatorCerts: []string{"ops-laptop"}, ViewerCerts: []string{"wall"}},
		Libvirt: Libvirt{Socket: "/run/libvirt/virtqemud-sock", URI: "qemu:///session", StateDir: "/qemu"},
		Limits:  Limits{GuestMemory: Size{64 << 30}, MemoryReserve: Size{1 << 40}, MigrationsOut: 1, MigrationsIn: 8},
		Migration: Migration{Timeout: Duration{90 * time.Minute}, BandwidthMiBs: 500, TLS: true, Address: "198.51.100.1", Compression: "zstd",
			MaxPause: Duration{time.Second}, Allow: []maint.Means{maint.MeansParallel, maint.MeansSlow}, CopyDisks: "all"},
		Hold: Hold{MaxPause: Duration{5 * time.Second}, MaxPauseLimit: Duration{30 * time.Second},
			LeashSilence: Duration{2 * time.Second}, KillLibvirt: Duration{4 * time.Second}, CommandsBy: "operators", Leash: "/usr/libexec/leash"},
		Kexec: Kexec{Dir: "/memory", ColdStart: true},
		Patch: Patch{Keys: "/keys", Soak: Duration{time.Minute}, Health: []string{"/bin/healthy", "-q"}, HealthTimeout: Duration{5 * time.Second}, Components: []string{"libvirtd.service"}},
		Events: Events{Enabled: true, Policy: "any", Wake: "/etc/belay/wake", Upstream: "http://127.0.0.1:8775", IMDSv1: true, EC2ShowsFreeze: true,
			Notice: map[string]Duration{"Freeze": {20 * time.Minute}}, Owners: map[string]Owner{"shop": {Guests: []string{"shop-*"}}},
			Windows: []Window{{Guests: []string{"shop-*"}, Rule: "FREQ=DAILY;BYHOUR=2", Zone: "Europe/Berlin", Length: Duration{3 * time.Hour},
				From: "2026-12-01", Except: []string{"2026-12-24"}}}},
		Policy: Policy{Rules: Rules{MaxPause: &Duration{20 * time.Second}, Refuse: []maint.Rung{"B3"}},
			Guests: []GuestRules{{Names: []string{"shop-*"}, Rules: Rules{MaxPause: &Duration{2 * time.Second}, MaxBlackout: &Duration{500 * time.Millisecond},
				Refuse: []maint.Rung{}, Prefer: []maint.Rung{"D"}, Ask: []maint.Rung{"B"}, Notice: &Duration{24 * time.Hour}, SecurityNotice: &Duration{time.Hour},
				AntiAffinity: []string{"shop"}, Priority: 10, Owner: "shop", Windows: []RulesWindow{{Rule: "FREQ=DAILY;BYHOUR=2", Zone: "Europe/Berlin",
					Length: Duration{3 * time.Hour}, From: "2026-12-01", Except: []string{"2026-12-24"}}}}}}},
		Journal: Journal{Keep: Duration{24 * time.Hour}}, AntiAffinity: map[string][]string{"db": {"db-*"}},
		Peers: map[string]Peer{
			"host-b": {Address: "192.0.2.2:7443", CertName: "host-b", LibvirtURI: "qemu+tls://host-b/system", MigrateURI: "tcp://192.0.2.2"},
			"host-c": {Address: "host-c:7443", CertName: "c.example.net", LibvirtURI: "qemu+ssh://root@host-c/system"},
		},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// A check of guests says only what it asks: ten failures in a row, a second apart, are one.
func TestHealthDefaults(t *testing.T) {
	t.Parallel()
	c, err := Load(one(t, "[[health]]\nguests = ['a']\nhttp = 'http://{guest}/'\n[[health]]\nguests = ['b']\nheartbeat = true\nwarm_up = '1m'\nfailures = 3\nevery = '2s'\nwithin = '9s'\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := []Health{
		{Guests: []string{"a"}, HTTP: "http://{guest}/", Every: Duration{time.Second}, Failures: 10, Within: Duration{30 * time.Second}},
		{Guests: []string{"b"}, Heartbeat: true, WarmUp: Duration{time.Minute}, Every: Duration{2 * time.Second}, Failures: 3, Within: Duration{9 * time.Second}},
	}
	if d := cmp.Diff(want, c.Health); d != "" {
		t.Error(d)
	}
}

func TestDropIns(t *testing.T) {
	t.Parallel()
	got, err := Load(files(t, map[string]string{
		"belayd.toml": tlsFiles + `
[access]
operators = ["ada"]
[limits]
migrations_out = 1
[peers.host-b]
address = "b:7443"
cert_name = "b.example.net"
libvirt_uri = "qemu+tls://b/system"
`,
		"belayd.d/20-later.toml":   "[limits]\nmigrations_out = 3\n[access]\noperators = ['grace']\n",
		"belayd.d/10-earlier.toml": "[limits]\nmigrations_out = 2\nmigrations_in = 2\n",
		"belayd.d/30-peers.toml": `
[peers.host-b]
migrate_uri = "tcp://198.51.100.2"
[peers.host-c]
address = "c:7443"
libvirt_uri = "qemu+tls://c/system"
`,
		"belayd.d/40-notes.txt": "not a drop-in",
	}))
	if err != nil {
		t.Fatal(err)
	}
	if got.Limits.MigrationsOut != 3 || got.Limits.MigrationsIn != 2 {
		t.Errorf("limits are %+v: the later drop-in does not win", got.Limits)
	}
	if d := cmp.Diff([]string{"grace"}, got.Access.Operators); d != "" {
		t.Errorf("a list is to be replaced, not added to:\n%s", d)
	}
	want := map[string]Peer{
		"host-b": {Address: "b:7443", CertName: "b.example.net", LibvirtURI: "qemu+tls://b/system", MigrateURI: "tcp://198.51.100.2"},
		"host-c": {Address: "c:7443", CertName: "host-c", LibvirtURI: "qemu+tls://c/system"},
	}
	if d := cmp.Diff(want, got.Peers); d != "" {
		t.Errorf("peers do not merge by key:\n%s", d)
	}
}

func TestMistakeInDropInNamesTheDropIn(t *testing.T) {
	t.Parallel()
	_, err := Load(files(t, map[string]string{
		"belayd.toml":         "host = 'host-a'\n",
		"belayd.d/50-me.toml": "\n\nhots = 'host-b'\n",
	}))
	if err == nil || !strings.Contains(err.Error(), "belayd.d/50-me.toml:3: ") {
		t.Errorf("the error does not name the drop-in and its line: %v", err)
	}
}

func TestAbsentFile(t *testing.T) {
	t.Parallel()
	main := filepath.Join(t.TempDir(), "absent.toml")
	_, err := Load(main)
	if err == nil || !strings.Contains(err.Error(), main) {
		t.Errorf("the error does not name the file: %v", err)
	}
}

// TestFolderAsFile: a folder where the file should be is no empty file.
func TestFolderAsFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if _, err := Load(dir); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("the error does not name the folder: %v", err)
	}
}

// TestDropInsThatCannotBeListed: what cannot be read is not as if it were not
// there, and nothing is read without end.
func TestDropInsThatCannotBeListed(t *testing.T) {
	t.Parallel()
	for what, setup := range map[string]func(folder string) error{
		"a file":      func(folder string) error { return os.WriteFile(folder, nil, 0o600) },
		"a link loop": func(folder string) error { return os.Symlink(folder, folder) },
		"with a link loop": func(folder string) error {
			return errors.Join(os.Mkdir(folder, 0o700), os.Symlink("x.toml", folder+"/x.toml"))
		},
		"with a folder": func(folder string) error { return os.MkdirAll(folder+"/x.toml", 0o700) },
		"with an endless one": func(folder string) error {
			return errors.Join(os.Mkdir(folder, 0o700), os.Symlink("/dev/zero", folder+"/x.toml"))
		},
	} {
		main := one(t, "host = 'host-a'")
		folder := strings.TrimSuffix(main, ".toml") + ".d"
		if err := setup(folder); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(main); err == nil || !strings.Contains(err.Error(), folder) {
			t.Errorf("drop-ins are %s: %v", what, err)
		}
	}
}

func TestSize(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]uint64{"0KiB": 0, "1KiB": 1 << 10, "512MiB": 512 << 20, "64 GiB": 64 << 30, "3TiB": 3 << 40} {
		var s Size
		if err := s.UnmarshalText([]byte(text)); err != nil || s.Bytes != want {
			t.Errorf("%s is read as %d, %v", text, s.Bytes, err)
		}
	}
	for _, text := range []string{"", "MiB", "-1MiB", "1.5GiB", "1", "1MB", "0x10MiB", "1 MiB B", "18446744073709551615KiB"} {
		s := Size{7}
		if err := s.UnmarshalText([]byte(text)); err == nil || s.Bytes != 7 {
			t.Errorf("%q is read as %d, %v", text, s.Bytes, err)
		}
	}
}

// FuzzDecode: whatever is in a file, it is read or refused, and a refusal
// names the file.
func FuzzDecode(f *testing.F) {
	for _, s := range []string{
		"", "host = 'a'", "hots = 'a'", "[peers.b]\naddress = 'b:1'", "[limits]\nguest_memory = '64GiB'",
		"[peers]\nb = 1", "peers = []", "[[peers]]", "[api.listen]\nx = 1", "a.b.c.d = 1", "[migration]\ntimeout = 5",
		"[limits]\nguest_memory = 1_0", "[limits]\nguest_memory = true", "limits.guest_memory = 0x1F", "journal = {keep = 1e3}", "journal.keep = [1]", "journal.keep = nan",
		"\x00", "\"\" = 1", "[\"\"]\n\"\" = 1", "host = \"\\uD800\"", "[access]\noperators = [1]", "1979-05-27 = 1979-05-27",
		"[migration]\naddress = '::1%'", "[migration]\nallow = [1]", "[migration]\nmax_pause = -1", "[migration]\nzero_copy = true\ntls = true", "[migration]\ncopy_disks = ''",
		"[anti_affinity]\ndb = ['[']", "anti_affinity = ['db']", "[anti_affinity]\n'' = ['']", "[peers.b]\nmigrate_uri = 'tcp://['", "[peers.b]\ntls_name = \"\\u001b\"",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c := defaults()
		if err := decode("the-file.toml", b, &c); err != nil {
			if !strings.Contains(err.Error(), "the-file.toml") {
				t.Errorf("the file is not named: %v", err)
			}
			return
		}
		_ = c.check()
	})
}
