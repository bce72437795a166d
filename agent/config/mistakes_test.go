package config

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestMistakes says what a person reads who has made a mistake: always the
// file, the line and the key.
func TestMistakes(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, text string
		want       []string // each is in the error
	}{
		{"typo", "[limits]\nmigration_out = 2\n",
			[]string{"belayd.toml:2", `"limits.migration_out"`, `did you mean "migrations_out"?`}},
		{"typo in a peer", "[peers.host-b]\n\nadress = 'b:1'\n",
			[]string{"belayd.toml:3", `"peers.host-b.adress"`, `did you mean "address"?`}},
		{"typo of a section", "[acess]\noperators = []\n",
			[]string{"belayd.toml:1", `"acess`, `did you mean "access"?`}},
		{"several typos", "hots = 'a'\n[api]\nlisten = 'a:1'\nsokcet = '/s'\n",
			[]string{"belayd.toml:1", `"hots"`, `did you mean "host"?`, "belayd.toml:4", `"api.sokcet"`, `did you mean "socket"?`}},
		{"a notice that is too short", "[events.notice]\nFreeze = '1m'\n",
			[]string{"events.notice.Freeze", "15m0s"}},
		{"a notice of nothing", "[events.notice]\nMelt = '1h'\n",
			[]string{"events.notice.Melt", "there is no such impact"}},
		{"no service", "[events]\nupstream = '127.0.0.1:8775'\n",
			[]string{"events.upstream", "http://127.0.0.1:8775"}},
		{"no policy", "[events]\npolicy = 'some'\n",
			[]string{"events.policy", "host-owner"}},
		{"an owner of nothing", "[events.owners.shop]\n",
			[]string{"events.owners.shop", "for no guests"}},
		{"an owner without a name", "[events.owners.\"\"]\nguests = ['web-1']\n",
			[]string{"events.owners", `"" is not a name`}},
		{"a window of nobody", "[[events.windows]]\nrule = 'FREQ=DAILY;BYHOUR=2'\nzone = 'UTC'\nlength = '2h'\n",
			[]string{"events.windows, number 1", "for no guests"}},
		{"no pattern", "[events.owners.shop]\nguests = ['[']\n",
			[]string{"events.owners.shop", `"["`}},
		{"a group of nobody", "[anti_affinity]\ndb = []\n",
			[]string{"anti_affinity.db", "for no guests"}},
		{"a check of nobody", "[[health]]\ntcp = 'a:1'\n", []string{"health, number 1", "for no guests"}},
		{"a check in no way", "[[health]]\nguests = ['a']\n", []string{"health, number 1", "has 0 of tcp, http, command, agent and heartbeat"}},
		{"a check in two ways", "[[health]]\nguests = ['a']\ntcp = 'a:1'\nhttp = 'http://a'\n", []string{"has 2 of tcp, http, command, agent and heartbeat"}},
		{"a check of no port", "[[health]]\nguests = ['a']\ntcp = '{guest}'\n", []string{`"{guest}" is not host:port`}},
		{"a check of no URL", "[[health]]\nguests = ['a']\nhttp = 'ftp://{guest}/'\n", []string{"is not a URL"}},
		{"a check by no path", "[[health]]\nguests = ['a']\ncommand = ['true']\n", []string{`"true" is not an absolute path`}},
		{"a check too often", "[[health]]\nguests = ['a']\nagent = true\nevery = '1ms'\n", []string{"every: 1ms is not between 100ms and 1m"}},
		{"a check too late", "[[health]]\nguests = ['a']\nheartbeat = true\nwarm_up = '5m'\n", []string{"warm_up: 5m0s is not between 0s and 4m"}},
		{"a check that never fails", "[[health]]\nguests = ['a']\nhttp = 'http://a'\nfailures = -1\n", []string{"failures: -1 is not between 1 and 1000"}},
		{"a check for too long", "[[health]]\nguests = ['a']\ntcp = 'a:1'\nwithin = '1h'\n", []string{"within", "is not between 1s and 5m"}},
		{"a group without a name", "[anti_affinity]\n'' = ['db-1']\n",
			[]string{"anti_affinity", `"" is not a name`}},
		{"nothing like it", "[api]\nfrobnicate = true\n",
			[]string{"belayd.toml:2", `there is no setting "api.frobnicate"`}},
		{"below a value", "[api.listen]\nport = 1\n",
			[]string{"belayd.toml:", "api.listen"}},
		{"number for text", "\nhost = 5\n",
			[]string{"belayd.toml:2", `"host"`}},
		{"text for number", "[limits]\nmigrations_in = 'two'\n",
			[]string{"belayd.toml:2", `"limits.migrations_in"`}},
		{"text for list", "[access]\noperators = 'ada'\n",
			[]string{"belayd.toml:2", `"access.operators"`}},
		{"text for truth", "[migration]\ntls = 'yes'\n",
			[]string{"belayd.toml:2", `"migration.tls"`}},
		{"no address", "[migration]\naddress = 'host-a'\n", []string{`migration.address: "host-a" is not an address of this host`}},
		{"an address of two families", "[migration]\naddress = '::ffff:198.51.100.1'\n", []string{`migration.address: "::ffff:198.51.100.1"`}},
		{"an address of nobody else", "[migration]\naddress = '127.0.0.1'\n", []string{`migration.address: "127.0.0.1"`}},
		{"unknown compression", "[migration]\ncompression = 'mt'\n", []string{`migration.compression: "mt" is none of [xbzrle zlib zstd]`}},
		{"zero-copy, and TLS", "[migration]\nzero_copy = true\ntls = true\n", []string{"migration.zero_copy", "TLS copies what it encrypts"}},
		{"zero-copy, and compression", "[migration]\nzero_copy = true\ncompression = 'zstd'\n", []string{"migration.zero_copy", "choose one of"}},
		{"no migrate_uri", tlsFiles + "[peers.b]\naddress = 'b:7443'\nlibvirt_uri = 'qemu+tls://b/system'\nmigrate_uri = '192.0.2.2'\n", []string{`peers.b.migrate_uri: "192.0.2.2"`}},
		{"a migrate_uri of no port", tlsFiles + "[peers.b]\naddress = 'b:7443'\nlibvirt_uri = 'qemu+tls://b/system'\nmigrate_uri = 'tcp://192.0.2.2:99999'\n", []string{`peers.b.migrate_uri: "tcp://192.0.2.2:99999"`}},
		{"no tls_name", tlsFiles + "[peers.b]\naddress = 'b:7443'\nlibvirt_uri = 'qemu+tls://b/system'\ntls_name = 'a b'\n", []string{"peers.b.tls_name"}},
		{"negative bandwidth", "[migration]\nbandwidth_mib_s = -1\n",
			[]string{"belayd.toml:2", `"migration.bandwidth_mib_s"`}},
		{"bad duration", "[migration]\n\ntimeout = 'soon'\n",
			[]string{"belayd.toml:3", `"migration.timeout"`, `"soon" is not a duration such as "30m"`}},
		{"duration without unit", "[journal]\nkeep = 90\n",
			[]string{"belayd.toml:2", `"journal.keep"`}},
		{"bad size", "[limits]\nguest_memory = '64GB'\n",
			[]string{"belayd.toml:2", `"limits.guest_memory"`, `"64GB" is not a size such as "512MiB"`}},
		{"size without unit", "[limits]\nmemory_reserve = 512\n",
			[]string{"belayd.toml:2", `"limits.memory_reserve"`, `"512" is not a size such as "512MiB"`}},
		{"size as a table", "[limits.memory_reserve]\nbytes = 512\n",
			[]string{"belayd.toml:2", `"limits.memory_reserve.bytes"`}},
		{"size beyond all memory", "[limits]\nguest_memory = '99999999999TiB'\n",
			[]string{"belayd.toml:2", `"limits.guest_memory"`, "is not a size"}},
		{"not TOML", "host = 'a'\n[limits\n",
			[]string{"belayd.toml:2"}},
		{"twice", "host = 'a'\nhost = 'b'\n",
			[]string{"belayd.toml", "host"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			_, err := Load(one(t, c.text))
			if err == nil {
				t.Fatal("no error")
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q is not in the error: %v", want, err)
				}
			}
		})
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	const peer = tlsFiles + "[peers.host-b]\naddress='b:1'\nlibvirt_uri='qemu+tls://b/system'\n"
	for _, c := range []struct{ name, text, want string }{
		{"empty host", "host=''", "configuration: host: is empty"},
		{"relative state folder", "state_dir='state'", `configuration: state_dir: "state" is not an absolute path`},
		{"relative socket", "[api]\nsocket='sock'", `configuration: api.socket: "sock" is not an absolute path`},
		{"relative run folder", "run_dir='run'", `configuration: run_dir: "run" is not an absolute path`},
		{"run folder with a line end", `run_dir="/run/b\nc"`, `configuration: run_dir: "/run/b\nc" has control characters`},
		{"root as run folder", "run_dir='//.'", `configuration: run_dir: "//." is no folder for belayd alone`},
		{"long run folder", "run_dir='/" + strings.Repeat("x", 49) + "'", "configuration: run_dir: it has 50 bytes, and can have 49"},
		{"listen without port", tlsFiles + "[api]\nlisten='0.0.0.0'", `configuration: api.listen: "0.0.0.0" is not host:port`},
		{"metrics without port", "[api]\nmetrics='9100'", `configuration: api.metrics: "9100" is not host:port`},
		{"no such port", tlsFiles + "[api]\nlisten=':65536'", `configuration: api.listen: ":65536" is not host:port`},
		{"negative port", "[api]\nmetrics='localhost:-1'", `configuration: api.metrics: "localhost:-1" is not host:port`},
		{"page without port", "[page]\nlisten='127.0.0.1'", `configuration: page.listen: "127.0.0.1" is not host:port`},
		{"page for the network", "[page]\nlisten='0.0.0.0:9478'", `configuration: page.listen: "0.0.0.0:9478" is not on loopback`},
		{"page for everybody", "[page]\nlisten=':9478'", `configuration: page.listen: ":9478" is not on loopback`},
		{"page by a name", "[page]\nlisten='localhost:9478'", `configuration: page.listen: "localhost:9478" is not on loopback`},
		{"page past the viewers", "[access]\nviewers=['ada']\n[page]\nlisten='127.0.0.1:9478'", `access.viewers is not for all; have "*" among them, or serve no page`},
		{"long socket", "[api]\nsocket='/" + strings.Repeat("x", 107) + "'", "has 108 bytes, a unix socket's path can have 107"},
		{"host with a line end", `host="a\nb"`, `configuration: host: "a\nb" has spaces or control characters`},
		{"long pause", "[migration]\nmax_pause='2m'", "configuration: migration.max_pause: 2m0s is not between 1ms and 1m0s"},
		{"unknown means", "[migration]\nallow=['prayer']", `configuration: migration.allow: "prayer" is none of [bandwidth parallel slow postcopy]`},
		{"much bandwidth", "[migration]\nbandwidth_mib_s=1048577", "configuration: migration.bandwidth_mib_s: 1048577 is out of range"},
		{"peer without a name", strings.Replace(peer, "host-b", `""`, 1), `configuration: peers: "" is not a name`},
		{"peer with a line end", strings.Replace(peer, "host-b", `"b\u001b[2J"`, 1), `configuration: peers: "b\x1b[2J" is not a name`},
		{"peer on no port", strings.Replace(peer, "b:1", "b:0", 1), `configuration: peers.host-b.address: "b:0" is not host:port`},
		{"peer on no host", strings.Replace(peer, "b:1", ":1", 1), `configuration: peers.host-b.address: ":1" is not host:port`},
		{"two peers alike", peer + "cert_name='c'\n[peers.c]\naddress='c:1'\nlibvirt_uri='qemu+tls://c/system'", `configuration: peers: c and host-b have the same cert_name "c"`},
		{"listen without CA", "[tls]\ncert='/c'\nkey='/k'\n[api]\nlisten=':1'", "configuration: tls.ca: is needed"},
		{"peers without certificate", strings.Replace(peer, "cert='/cert'", "", 1), "configuration: tls.cert: is needed"},
		{"peers without key", strings.Replace(peer, "key='/key'", "", 1), "configuration: tls.key: is needed"},
		{"no migrations out", "[limits]\nmigrations_out=0", "configuration: limits.migrations_out: 0 is not between 1 and 8"},
		{"too many migrations out", "[limits]\nmigrations_out=9", "configuration: limits.migrations_out: 9 is not"},
		{"no migrations in", "[limits]\nmigrations_in=-1", "configuration: limits.migrations_in: -1 is not"},
		{"too many migrations in", "[limits]\nmigrations_in=9", "configuration: limits.migrations_in: 9 is not"},
		{"no time", "[migration]\ntimeout='0s'", "configuration: migration.timeout: must be longer than 0"},
		{"much time", "[migration]\ntimeout='25h'", "configuration: migration.timeout: 25h0m0s is longer than 24h0m0s"},
		{"negative time", "[migration]\ntimeout='-5m'", "configuration: migration.timeout: must be longer than 0"},
		{"no pause", "[hold]\nmax_pause='0s'", "configuration: hold.max_pause: "},
		{"pause beyond its limit", "[hold]\nmax_pause='1h'", "configuration: hold.max_pause: "},
		{"pause shorter than any", "[hold]\nmax_pause='499ms'", "configuration: hold.max_pause: 499ms is not between 500ms and "},
		{"limit shorter than any pause", "[hold]\nmax_pause='1ns'\nmax_pause_limit='1ns'", "configuration: hold.max_pause_limit: 1ns is not between 500ms and 24h0m0s"},
		{"limit longer than any pause", "[hold]\nmax_pause_limit='24h1s'", "configuration: hold.max_pause_limit: 24h0m1s is not between"},
		{"keys nowhere", "[patch]\nkeys='keys'", "configuration: patch.keys: "},
		{"helper nowhere", "[patch]\nhelper='kernel.sock'", "configuration: patch.helper: "},
		{"no soak", "[patch]\nsoak='0s'", "configuration: patch.soak: "},
		{"health by PATH", "[patch]\nhealth=['healthy']", "configuration: patch.health: "},
		{"endless health", "[patch]\nhealth_timeout='48h'", "configuration: patch.health_timeout: "},
		{"component that is no service", "[patch]\ncomponents=['libvirtd']", "configuration: patch.components: "},
		{"memory nowhere", "[kexec]\ndir='memory'", "configuration: kexec.dir: "},
		{"nervous leash", "[hold]\nleash_silence='10ms'", "configuration: hold.leash_silence: "},
		{"libvirt killed in advance", "[hold]\nkill_libvirt='-1s'", "configuration: hold.kill_libvirt: "},
		{"commands by anybody", "[hold]\ncommands_by='all'", "configuration: hold.commands_by: "},
		{"leash anywhere", "[hold]\nleash='belay-leash'", "configuration: hold.leash: "},
		{"negative history", "[journal]\nkeep='-1h'", "configuration: journal.keep: "},
		{"itself as peer", "host='host-b'\n" + peer, "configuration: peers.host-b: is this host's own name"},
		{"peer without address", strings.Replace(peer, "b:1", "", 1), `configuration: peers.host-b.address: "" is not host:port`},
		{"peer without URI", strings.Replace(peer, "qemu+tls://b/system", "", 1), `configuration: peers.host-b.libvirt_uri: "" is not`},
		{"peer's URI is local", strings.Replace(peer, "qemu+tls://b/system", "qemu:///system", 1), `configuration: peers.host-b.libvirt_uri: "qemu:///system" is not`},
		{"peer's URI has no host", strings.Replace(peer, "qemu+tls://b/system", "qemu+unix:///system", 1), "configuration: peers.host-b.libvirt_uri: "},
		{"peer's URI is none", strings.Replace(peer, "qemu+tls://b/system", "qemu+tls://%zz", 1), "configuration: peers.host-b.libvirt_uri: "},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			_, err := Load(one(t, c.text))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("want %q in the error: %v", c.want, err)
			}
			if err != nil && strings.Count(err.Error(), "\n") > 0 {
				t.Errorf("there is one mistake, and more are told:\n%v", err)
			}
		})
	}
	if _, err := Load(one(t, peer)); err != nil {
		t.Errorf("what the mistakes are made from is wrong itself: %v", err)
	}
}

func TestAllRefusalsAtOnce(t *testing.T) {
	t.Parallel()
	_, err := Load(one(t, `
host = ""
state_dir = "state"
[api]
listen = "nonsense"
[limits]
migrations_in = 99
[migration]
timeout = "0s"
[peers.host-b]
address = "nonsense"
`))
	if err == nil {
		t.Fatal("no error")
	}
	var got []string
	for line := range strings.Lines(err.Error()) {
		_, rest, _ := strings.Cut(line, "configuration: ")
		key, _, _ := strings.Cut(rest, ": ")
		got = append(got, key)
	}
	want := []string{"api.listen", "host", "limits.migrations_in", "migration.timeout", "peers.host-b.address",
		"peers.host-b.libvirt_uri", "state_dir", "tls.ca", "tls.cert", "tls.key"}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("%s\n%v", d, err)
	}
}
