package config

import (
	"net/url"
	"path"
	"strings"
	"time"
)

// Health says how to ask guests whether they do their work: by one of TCP, HTTP and Command.
// In each "{guest}" stands for the guest's name.
type Health struct {
	Guests  []string `toml:"guests"`  // as those of an Owner
	TCP     string   `toml:"tcp"`     // host:port that is to accept a connection
	HTTP    string   `toml:"http"`    // URL that is to answer with 200 to 399
	Command []string `toml:"command"` // program in the guest, and its arguments; to exit with 0
	// Within is how long after its arrival a guest may take; default 30 s.
	Within Duration `toml:"within"`
}

const (
	healthWithin    = 30 * time.Second
	maxHealthWithin = 5 * time.Minute
)

// check refuses what cannot work, and fills in the default.
func (h *Health) check(key string, bad func(key, format string, args ...any)) {
	ways := 0
	for _, set := range []bool{h.TCP != "", h.HTTP != "", len(h.Command) > 0} {
		if set {
			ways++
		}
	}
	if ways != 1 {
		bad(key, "has %d of tcp, http and command; choose one", ways)
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
	if h.Within.Duration == 0 {
		h.Within.Duration = healthWithin
	}
	if d := h.Within.Duration; d < time.Second || d > maxHealthWithin {
		bad(key, "within: %s is not between 1s and %s", d, maxHealthWithin)
	}
}
