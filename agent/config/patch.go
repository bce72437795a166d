package config

import (
	"path/filepath"
	"strings"
	"time"
)

// Patch says how the running host is changed: rung A.
type Patch struct {
	// Keys is the folder of the minisign public keys (*.pub) that livepatches are trusted
	// by. belay-kernel has its own word on it (-keys).
	Keys string `toml:"keys"`
	// Helper is the socket of belay-kernel, which touches the kernel; "": belayd does, for
	// which it needs CAP_SYS_MODULE, CAP_SYSLOG and CAP_SYS_ADMIN.
	Helper string `toml:"helper"`
	// AutoLoad has the livepatch that was active loaded again after a boot of the same kernel.
	AutoLoad bool `toml:"auto_load"`
	// Soak is for how long the host is watched after a livepatch.
	Soak Duration `toml:"soak"`
	// Health is a command that says whether the host is well: program and arguments.
	Health []string `toml:"health"`
	// HealthTimeout bounds it.
	HealthTimeout Duration `toml:"health_timeout"`
	// Components are the units that guests do not touch.
	Components []string `toml:"components"`
}

func defaultPatch() Patch {
	return Patch{Keys: "/etc/belay/keys", Helper: "/run/belay/kernel.sock", AutoLoad: true,
		Soak: Duration{30 * time.Second}, HealthTimeout: Duration{30 * time.Second},
		Components: []string{"libvirtd.service", "virtqemud.service", "virtlogd.service", "prometheus-node-exporter.service", "belayd.service"}}
}

// Bounds of the soak.
const minSoak, maxSoak = 5 * time.Second, time.Hour

// check refuses what cannot work.
func (p Patch) check(bad func(key, format string, args ...any)) {
	if !filepath.IsAbs(p.Keys) {
		bad("patch.keys", "%q is not an absolute path", p.Keys)
	}
	if p.Helper != "" && !filepath.IsAbs(p.Helper) {
		bad("patch.helper", "%q is not an absolute path; \"\" has belayd do without", p.Helper)
	}
	if d := p.Soak.Duration; d < minSoak || d > maxSoak {
		bad("patch.soak", "%s is not between %s and %s", d, minSoak, maxSoak)
	}
	if d := p.HealthTimeout.Duration; d < time.Second || d > maxSoak {
		bad("patch.health_timeout", "%s is not between 1s and %s", d, maxSoak)
	}
	if len(p.Health) > 0 && !filepath.IsAbs(p.Health[0]) {
		bad("patch.health", "%q is not an absolute path of a program", p.Health[0])
	}
	for _, c := range p.Components {
		if !strings.HasSuffix(c, ".service") || strings.ContainsAny(c, "/ *?[") {
			bad("patch.components", "%q is no name of a service, such as libvirtd.service", c)
		}
	}
}
