package config

import (
	"cmp"
	"net/url"
	"path"
	"strings"
	"time"
)

// Health says how to ask guests whether they do their work: by one of TCP, HTTP, Command, Agent
// and Heartbeat. In the first three "{guest}" stands for the guest's name.
type Health struct {
	Guests  []string `toml:"guests"`  // as those of an Owner
	TCP     string   `toml:"tcp"`     // host:port that is to accept a connection
	HTTP    string   `toml:"http"`    // URL that is to answer with 200 to 399
	Command []string `toml:"command"` // program in the guest, and its arguments; to exit with 0
	Agent   bool     `toml:"agent"`   // its guest agent answers a ping
	// Heartbeat is that it asks for its events (rung C), within each 3 s that a try takes.
	Heartbeat bool `toml:"heartbeat"`

	// WarmUp is for how long it is not asked after something was done to it; default 0.
	WarmUp Duration `toml:"warm_up"`
	// Every is the pause between tries; default 1 s.
	Every Duration `toml:"every"`
	// Failures is how many tries in a row have to fail; default 10.
	Failures int `toml:"failures"`
	// Within is for how long is tried at most; default 30 s.
	Within Duration `toml:"within"`
}

// What a Health has that does not say otherwise, and the most that it can say. The host that
// a guest has come from hears of it for ten minutes.
const (
	HealthEvery       = time.Second
	HealthFailures    = 10
	HealthWithin      = 30 * time.Second
	maxHealthWarmUp   = 4 * time.Minute
	maxHealthEvery    = time.Minute
	maxHealthFailures = 1000
	maxHealthWithin   = 5 * time.Minute
)

// check refuses what cannot work, and fills in the default.
func (h *Health) check(key string, bad func(key, format string, args ...any)) {
	ways := 0
	for _, set := range []bool{h.TCP != "", h.HTTP != "", len(h.Command) > 0, h.Agent, h.Heartbeat} {
		if set {
			ways++
		}
	}
	if ways != 1 {
		bad(key, "has %d of tcp, http, command, agent and heartbeat; choose one", ways)
	}
	named := strings.NewReplacer("{guest}", "guest").Replace
	if t := named(h.TCP); t != "" && (!isHostPort(t) || strings.HasPrefix(t, ":") || strings.HasSuffix(t, ":0")) {
		bad(key, "tcp: %q is not host:port", h.TCP)
	}
	if u, err := url.Parse(named(h.HTTP)); h.HTTP != "" && (err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "") {
		bad(key, "http: %q is not a URL such as http://192.0.2.10/healthz", h.HTTP)
	}
	if len(h.Command) > 0 && !path.IsAbs(h.Command[0]) {
		bad(key, "command: %q is not an absolute path in guests", h.Command[0])
	}
	h.Every.Duration = cmp.Or(h.Every.Duration, HealthEvery)
	h.Failures = cmp.Or(h.Failures, HealthFailures)
	h.Within.Duration = cmp.Or(h.Within.Duration, HealthWithin)
	for _, d := range []struct {
		name            string
		is, least, most time.Duration
	}{
		{"warm_up", h.WarmUp.Duration, 0, maxHealthWarmUp},
		{"every", h.Every.Duration, 100 * time.Millisecond, maxHealthEvery},
		{"within", h.Within.Duration, time.Second, maxHealthWithin},
	} {
		if d.is < d.least || d.is > d.most {
			bad(key, "%s: %s is not between %s and %s", d.name, d.is, d.least, d.most)
		}
	}
	if h.Failures < 1 || h.Failures > maxHealthFailures {
		bad(key, "failures: %d is not between 1 and %d", h.Failures, maxHealthFailures)
	}
}
