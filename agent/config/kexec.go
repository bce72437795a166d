package config

import (
	"path/filepath"
	"strings"
)

// Kexec says how another kernel is started under guests: rung B3.
type Kexec struct {
	// Dir is where the file system in the reserved memory is mounted.
	Dir string `toml:"dir"`
	// ColdStart has guests boot afresh whose memory was lost, where they have autostart.
	ColdStart bool `toml:"cold_start"`
	// InPlace has guests' memory stay where it is, if that is in the reserved memory already.
	InPlace bool `toml:"in_place"`
}

func defaultKexec() Kexec { return Kexec{Dir: "/var/lib/belay/memory", InPlace: true} }

// check refuses what cannot work.
func (k Kexec) check(bad func(key, format string, args ...any)) {
	if !filepath.IsAbs(k.Dir) || filepath.Clean(k.Dir) != k.Dir || k.Dir == "/" || strings.ContainsAny(k.Dir, " \t\n") {
		bad("kexec.dir", "%q is not a plain absolute path of a folder", k.Dir)
	}
}
