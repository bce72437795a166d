package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/pelletier/go-toml/v2"

	"belay/agent/maint"
)

// DefaultFile is read when no other file is named; it may be absent.
const DefaultFile = "/etc/belay/belayd.toml"

// Config is belayd's configuration.
type Config struct {
	// Host is this host's name among its peers; default: the hostname.
	Host string `toml:"host"`
	// StateDir holds the journal.
	StateDir string `toml:"state_dir"`
	// RunDir, on a tmpfs, holds what only matters until the next boot: the
	// leash's notes and what host steps do.
	RunDir string `toml:"run_dir"`

	API       API             `toml:"api"`
	Page      Page            `toml:"page"`
	TLS       TLS             `toml:"tls"`
	Access    Access          `toml:"access"`
	Libvirt   Libvirt         `toml:"libvirt"`
	Limits    Limits          `toml:"limits"`
	Migration Migration       `toml:"migration"`
	Hold      Hold            `toml:"hold"`
	Events    Events          `toml:"events"`
	Patch     Patch           `toml:"patch"`
	Kexec     Kexec           `toml:"kexec"`
	Policy    Policy          `toml:"policy"`
	Journal   Journal         `toml:"journal"`
	Peers     map[string]Peer `toml:"peers"`
	// AntiAffinity are groups of guests, by name, of which there is to be one on
	// a host: guests' names, patterns of names ("db-*"), or UUIDs. Guests can
	// also say so in their <metadata>.
	AntiAffinity map[string][]string `toml:"anti_affinity"`
	// Health says how guests are asked whether they do their work, before and after a move.
	// The first that is for a guest is used.
	Health []Health `toml:"health"`
}

// API says where belayd listens.
type API struct {
	Socket  string `toml:"socket"`  // unix socket for the operators of this host
	Listen  string `toml:"listen"`  // host:port for peers, mutual TLS; "" for none
	Metrics string `toml:"metrics"` // host:port for Prometheus, plain HTTP; "" for none
}

// TLS names PEM files.
type TLS struct {
	CA   string `toml:"ca"`
	Cert string `toml:"cert"`
	Key  string `toml:"key"`
}

// Access says who may do what. See api.Access.
type Access struct {
	Operators     []string `toml:"operators"`
	Viewers       []string `toml:"viewers"`
	OperatorCerts []string `toml:"operator_certs"`
	ViewerCerts   []string `toml:"viewer_certs"`
}

// Hold has the defaults for holding guests, rung B.
type Hold struct {
	MaxPause      Duration `toml:"max_pause"`       // the longest pause unless the request says another
	MaxPauseLimit Duration `toml:"max_pause_limit"` // what a request may say at most
	// LeashSilence is how long the leash waits for a word of belayd before it
	// releases the guests.
	LeashSilence Duration `toml:"leash_silence"`
	// KillLibvirt is how long after the deadline a libvirt daemon that hangs,
	// and so keeps guests paused, is killed; 0 is never.
	KillLibvirt Duration `toml:"kill_libvirt"`
	// CommandsBy says who may have belayd run commands while guests are
	// held: "root" on this host only, or "operators".
	CommandsBy string `toml:"commands_by"`
	// Leash is the leash's program; "" finds it beside belayd's own.
	Leash string `toml:"leash"`
}

// Events says how guests are told what will happen to them.
type Events struct {
	// Enabled has guests told, and waited for, by every operation that they feel.
	Enabled bool `toml:"enabled"`
	// Notice is how long before its start an event is announced, by impact
	// ("Freeze"); never shorter than maint.MinimumNotice.
	Notice map[string]Duration `toml:"notice"`
	// Owners have guests in common: one event is about all of them, and an
	// approval by one is by all.
	Owners map[string]Owner `toml:"owners"`
	// Policy is whose approval an operation waits for: maint.PolicyAll, PolicyAny
	// or PolicyHostOwner.
	Policy string `toml:"policy"`
	// Windows are when guests may be disturbed that pick the moment.
	Windows []Window `toml:"windows"`
	// Wake is a program in guests that their guest agent is asked to start when
	// their events change; "": none.
	Wake string `toml:"wake"`
	// Upstream is another metadata service ("http://127.0.0.1:8775"), which answers
	// what is not about events.
	Upstream string `toml:"upstream"`
	// IMDSv1 has the view for EC2 answer without a token.
	IMDSv1 bool `toml:"imds_v1"`
	// EC2ShowsFreeze shows a freeze as system-maintenance in the view for EC2,
	// on which some clients empty the guest.
	EC2ShowsFreeze bool `toml:"ec2_shows_freeze"`
}

// Window is a maint.Window for some guests.
type Window struct {
	Guests []string `toml:"guests"` // as those of an Owner
	Rule   string   `toml:"rule"`
	Zone   string   `toml:"zone"`
	Length Duration `toml:"length"`
	From   string   `toml:"from"`
	Except []string `toml:"except"`
}

// Owner is somebody who has guests.
type Owner struct {
	Guests []string `toml:"guests"` // names, patterns of names ("shop-*"), or UUIDs
}

// Libvirt says how to reach this host's libvirt.
type Libvirt struct {
	Socket string `toml:"socket"` // "" finds virtqemud's or libvirtd's
	URI    string `toml:"uri"`
	// StateDir is where libvirt keeps the sockets of guests' QEMU monitors.
	StateDir string `toml:"state_dir"`
}

// Limits bound what this host takes on.
type Limits struct {
	GuestMemory   Size `toml:"guest_memory"`   // for all guests together; 0 for no limit
	MemoryReserve Size `toml:"memory_reserve"` // kept free for the host itself
	MigrationsOut int  `toml:"migrations_out"` // at once
	MigrationsIn  int  `toml:"migrations_in"`  // at once
}

// Journal says how long history is kept.
type Journal struct {
	Keep Duration `toml:"keep"`
}

func defaults() Config {
	host, err := os.Hostname()
	if err != nil {
		host = "localhost"
	}
	return Config{
		Host: host, StateDir: "/var/lib/belay", RunDir: "/run/belay",
		API:       API{Socket: "/run/belay/belayd.sock"},
		Access:    Access{Operators: []string{"@libvirt", "@belay"}, Viewers: []string{"*"}},
		Libvirt:   Libvirt{URI: "qemu:///system", StateDir: "/var/lib/libvirt/qemu"},
		Limits:    Limits{MemoryReserve: Size{512 << 20}, MigrationsOut: 4, MigrationsIn: 4},
		Migration: Migration{Timeout: Duration{30 * time.Minute}, MaxPause: Duration{300 * time.Millisecond}, CopyDisks: maint.CopyNone},
		Hold: Hold{MaxPause: Duration{10 * time.Second}, MaxPauseLimit: Duration{5 * time.Minute},
			LeashSilence: Duration{3 * time.Second}, CommandsBy: "root"},
		Events:  Events{Policy: string(maint.PolicyAll)},
		Patch:   defaultPatch(),
		Kexec:   defaultKexec(),
		Journal: Journal{Keep: Duration{90 * 24 * time.Hour}},
	}
}

// Load reads file and its drop-ins: *.toml in the folder beside it that has
// its name with ".d" for ".toml", in order of name, later ones winning. The
// default file also has drop-ins in /usr/lib/belay/belayd.d (before it) and
// /run/belay/belayd.d (after it), and may itself be absent.
func Load(file string) (Config, error) {
	c := defaults()
	files := []string{file}
	own, err := dropIns(strings.TrimSuffix(file, ".toml") + ".d")
	if err != nil {
		return c, err
	}
	files = append(files, own...)
	if file == DefaultFile {
		vendor, err := dropIns("/usr/lib/belay/belayd.d")
		if err != nil {
			return c, err
		}
		volatile, err := dropIns("/run/belay/belayd.d")
		if err != nil {
			return c, err
		}
		files = slices.Concat(vendor, files, volatile)
	}
	for _, f := range files {
		b, err := read(f)
		if f == DefaultFile && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return c, fmt.Errorf("cannot read the configuration: %w (name a file that belayd may read, belayd -config FILE)", err)
		}
		if err := decode(f, b, &c); err != nil {
			return c, err
		}
	}
	return c, c.check()
}

// dropIns lists the drop-ins in dir. Only an absent folder has none: one that
// cannot be listed may have what keeps somebody out.
func dropIns(dir string) (files []string, err error) {
	entries, err := os.ReadDir(dir) // sorted
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot list the drop-ins: %w (it must be a folder that belayd may read, or absent)", err)
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".toml") {
			files = append(files, filepath.Join(dir, e.Name()))
		}
	}
	return files, nil
}

// maxFile is more than any configuration has, bytes; a device has no end.
const maxFile = 4 << 20

func read(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(b) > maxFile {
		err = fmt.Errorf("%s is larger than %d MiB", file, maxFile>>20)
	}
	return b, err
}

// decode reads one file over what c has.
func decode(file string, b []byte, c *Config) error {
	d := toml.NewDecoder(strings.NewReader(string(b))).DisallowUnknownFields()
	err := d.Decode(c)
	var missing *toml.StrictMissingError
	var bad *toml.DecodeError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &missing) && len(missing.Errors) > 0:
		var errs []error
		for _, e := range missing.Errors {
			row, _ := e.Position()
			errs = append(errs, fmt.Errorf("%s:%d: there is no setting %q%s", file, row, strings.Join(e.Key(), "."), suggest(e.Key())))
		}
		return errors.Join(errs...)
	case errors.As(err, &bad):
		row, col := bad.Position()
		key := ""
		if k := strings.Join(bad.Key(), "."); k != "" {
			key = " in setting " + strconv.Quote(k)
		}
		return fmt.Errorf("%s:%d:%d: %s%s", file, row, col, strings.TrimPrefix(bad.Error(), "toml: "), key)
	}
	return fmt.Errorf("%s: %w", file, err)
}

// check refuses values that cannot work, all at once, and fills in what
// follows from others.
func (c *Config) check() error {
	var errs []error
	bad := func(key, format string, args ...any) {
		errs = append(errs, fmt.Errorf("configuration: %s: %s", key, fmt.Sprintf(format, args...)))
	}
	switch {
	case c.Host == "":
		bad("host", "is empty; leave it out to use the hostname")
	case !isName(c.Host):
		bad("host", "%q has spaces or control characters", c.Host)
	}
	for key, path := range map[string]string{"state_dir": c.StateDir, "run_dir": c.RunDir, "api.socket": c.API.Socket, "libvirt.state_dir": c.Libvirt.StateDir} {
		if !filepath.IsAbs(path) {
			bad(key, "%q is not an absolute path", path)
		}
	}
	for key, addr := range map[string]string{"api.listen": c.API.Listen, "api.metrics": c.API.Metrics} {
		if addr == "" {
			continue
		}
		if !isHostPort(addr) {
			bad(key, "%q is not host:port", addr)
		}
	}
	switch longest := c.RunDir + leashSocket; {
	case !filepath.IsAbs(c.RunDir): // said above
	case strings.ContainsFunc(c.RunDir, unicode.IsControl):
		bad("run_dir", "%q has control characters", c.RunDir)
	case filepath.Clean(c.RunDir) == "/":
		bad("run_dir", "%q is no folder for belayd alone", c.RunDir)
	case len(longest) > maxSocketPath:
		bad("run_dir", "it has %d bytes, and can have %d: there are unix sockets in it", len(c.RunDir), maxSocketPath-len(leashSocket))
	}
	if len(c.API.Socket) > maxSocketPath {
		bad("api.socket", "%q has %d bytes, a unix socket's path can have %d", c.API.Socket, len(c.API.Socket), maxSocketPath)
	}
	if c.API.Listen != "" || len(c.Peers) > 0 {
		for key, path := range map[string]string{"tls.ca": c.TLS.CA, "tls.cert": c.TLS.Cert, "tls.key": c.TLS.Key} {
			if path == "" {
				bad(key, "is needed as soon as api.listen or a peer is set")
			}
		}
	}
	if c.Limits.MigrationsOut < 1 || c.Limits.MigrationsOut > 8 {
		bad("limits.migrations_out", "%d is not between 1 and 8", c.Limits.MigrationsOut)
	}
	if c.Limits.MigrationsIn < 1 || c.Limits.MigrationsIn > 8 {
		bad("limits.migrations_in", "%d is not between 1 and 8", c.Limits.MigrationsIn)
	}
	c.Page.check(c.Access.Viewers, bad)
	c.Migration.check(bad)
	c.Patch.check(bad)
	c.Kexec.check(bad)
	if limit := c.Hold.MaxPauseLimit.Duration; limit < MinPause || limit > maxPause {
		bad("hold.max_pause_limit", "%s is not between %s and %s", limit, MinPause, maxPause)
	} else if p := c.Hold.MaxPause.Duration; p < MinPause || p > limit {
		bad("hold.max_pause", "%s is not between %s and hold.max_pause_limit, %s", p, MinPause, limit)
	}
	if d := c.Hold.LeashSilence.Duration; d < time.Second || d > time.Minute {
		bad("hold.leash_silence", "%s is not between 1s and 1m", d)
	}
	if d := c.Hold.KillLibvirt.Duration; d != 0 && d < 3*time.Second {
		bad("hold.kill_libvirt", "%s is shorter than 3s; 0 means never", d)
	}
	if by := c.Hold.CommandsBy; by != "root" && by != "operators" {
		bad("hold.commands_by", "%q is neither \"root\" nor \"operators\"", by)
	}
	if c.Hold.Leash != "" && !filepath.IsAbs(c.Hold.Leash) {
		bad("hold.leash", "%q is not an absolute path", c.Hold.Leash)
	}
	for impact, d := range c.Events.Notice {
		key := "events.notice." + impact
		if !slices.Contains(maint.Impacts, maint.Impact(impact)) {
			bad(key, "there is no such impact; they are %v", maint.Impacts)
		} else if least := maint.MinimumNotice(maint.Impact(impact)); d.Duration < least || d.Duration > maxNotice {
			bad(key, "%s is not between %s and %s", d, least, maxNotice)
		}
	}
	if u, err := url.Parse(c.Events.Upstream); c.Events.Upstream != "" && (err != nil || u.Scheme != "http" || u.Host == "" || u.User != nil || u.RawQuery != "") {
		bad("events.upstream", "%q is not the URL of a metadata service, such as http://127.0.0.1:8775", c.Events.Upstream)
	}
	if c.Events.Wake != "" && !filepath.IsAbs(c.Events.Wake) {
		bad("events.wake", "%q is not an absolute path in guests", c.Events.Wake)
	}
	if p := maint.Policy(c.Events.Policy); p != maint.PolicyAll && p != maint.PolicyAny && p != maint.PolicyHostOwner {
		bad("events.policy", "%q is none of %q, %q, %q", p, maint.PolicyAll, maint.PolicyAny, maint.PolicyHostOwner)
	}
	named := func(key string, guests []string) {
		if len(guests) == 0 {
			bad(key, "is for no guests; name some, or take it out")
		}
		for _, g := range guests {
			if _, err := path.Match(g, ""); err != nil || g == "" {
				bad(key, "%q is no name, pattern or UUID of guests", g)
			}
		}
	}
	for name, o := range c.Events.Owners {
		if !isName(name) {
			bad("events.owners", "%q is not a name: it is empty, or has spaces or control characters", name)
			continue
		}
		named("events.owners."+name, o.Guests)
	}
	for name, guests := range c.AntiAffinity {
		if !isName(name) {
			bad("anti_affinity", "%q is not a name: it is empty, or has spaces or control characters", name)
			continue
		}
		named("anti_affinity."+name, guests)
	}
	c.Policy.check(bad, named)
	for i := range c.Health {
		key := fmt.Sprintf("health, number %d", i+1)
		named(key, c.Health[i].Guests)
		c.Health[i].check(key, bad)
	}
	for i, w := range c.Events.Windows {
		named(fmt.Sprintf("events.windows, number %d", i+1), w.Guests)
	}
	if c.Journal.Keep.Duration <= 0 {
		bad("journal.keep", "must be longer than 0")
	}
	c.checkPeers(bad)
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errors.Join(errs...)
}

const (
	// maxSocketPath is the longest path of a unix socket, bytes: sun_path of
	// unix(7) less its final NUL.
	maxSocketPath = 107
	// leashSocket is where in the run_dir a leash listens, with the longest
	// name that one has.
	leashSocket = "/leash/apply-20060102-150405-xxxxx-step999-undo3-away.sock"
	// MinPause is the shortest pause that can be asked for: the release
	// itself takes a part of it.
	MinPause = 500 * time.Millisecond
	// maxNotice is the longest that guests can be given.
	maxNotice = 7 * 24 * time.Hour
	// maxPause is the longest that a leash can be armed for.
	maxPause = 24 * time.Hour
)

// isHostPort accepts what can be listened on or dialled, as far as can be told
// without asking anybody.
func isHostPort(addr string) bool {
	_, port, err := net.SplitHostPort(addr)
	if err != nil || port == "" {
		return false
	}
	_, err = net.LookupPort("tcp", port)
	return err == nil
}

// isName accepts what can be told from the text around it.
func isName(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsPrint(r) })
}
