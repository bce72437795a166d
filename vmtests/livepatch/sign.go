package livepatch

import (
	"os"
	"path/filepath"
	"testing"

	"belay/patch/live"
	"belay/patch/live/livetest"
)

// The modules. All but Sleeper are livepatches, cumulative.
const (
	Fix1    = "belay_fix_1" // mends /proc/version
	Fix2    = "belay_fix_2" // and /proc/loadavg
	Warn    = "belay_warn"  // the kernel warns when /proc/version is read
	Oops    = "belay_oops"  // and has an Oops, which kills the reader
	Lost    = "belay_lost"  // changes a function that there is not
	Sleeper = "belay_sleeper"
	Stall   = "belay_stall" // changes the function that Sleeper's thread sleeps in
)

// All are their names.
func All() []string { return []string{Fix1, Fix2, Warn, Oops, Lost, Sleeper, Stall} }

// Functions are those that a livepatch changes, as its manifest has them.
func Functions(name string) []string {
	switch name {
	case Fix2:
		return []string{"vmlinux/version_proc_show", "vmlinux/loadavg_proc_show"}
	case Lost:
		return []string{"vmlinux/belay_no_such_function"}
	case Stall:
		return []string{Sleeper + "/belay_sleeper_wait"}
	case Sleeper:
		return nil
	}
	return []string{"vmlinux/version_proc_show"}
}

// File is a module's.
func (s Set) File(name string) string { return filepath.Join(s.Dir, name+".ko") }

// Signed is a module with its manifest, which edit may change, signed by a vendor.
func (s Set) Signed(t testing.TB, by *livetest.Vendor, name string, edit func(*live.Manifest)) live.Artifact {
	t.Helper()
	module, err := os.ReadFile(s.File(name))
	if err != nil {
		t.Fatal(err)
	}
	m := live.Manifest{Release: s.Release, Version: s.Version, Cumulative: true, Covers: []string{"CVE-" + name}, Functions: Functions(name)}
	if edit != nil {
		edit(&m)
	}
	return by.Vouch(module, m)
}
