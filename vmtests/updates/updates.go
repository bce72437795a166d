// Package updates has the four updates that show the ladder on a host of a lab, each by a
// manifest of its own. The demo applies them, and the tests kill what applies them.
package updates

import (
	"embed"
	"fmt"
	"os"
	"path/filepath"
)

// The updates.
const (
	Component = "component" // A: virtlogd executes its program anew
	Network   = "network"   // B1: the uplink is down for a moment
	QEMU      = "qemu"      // B2: a new QEMU under each guest
	Retire    = "retire"    // D, and C for guests whose policy asks before D: the host leaves service
)

// All are the updates, by the impact on guests.
func All() []string { return []string{Component, Network, QEMU, Retire} }

//go:embed *.toml
var manifests embed.FS

// Write writes an update's manifest into a folder, for belay plan and belay apply to read,
// and returns its path.
func Write(dir, update string) (string, error) {
	text, err := manifests.ReadFile(update + ".toml")
	if err != nil {
		return "", fmt.Errorf("there is no update %q: %w", update, err)
	}
	path := filepath.Join(dir, update+".toml")
	return path, os.WriteFile(path, text, 0o600)
}
