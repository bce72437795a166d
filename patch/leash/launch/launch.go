package launch

import (
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/coreos/go-systemd/v22/util"

	"belay/agent/maint"
	"belay/patch/leash"
)

// ProgramName is the leash's program.
const ProgramName = "belay-leash"

// Config says what is started.
type Config struct {
	// Program is an absolute path; see Program.
	Program string
	// Args are those for an operation's leash.
	Args func(op maint.OpID) []string
	Log  *slog.Logger
}

// New gives the way of starting that fits this host.
func New(c Config) leash.Launcher {
	if util.IsRunningSystemd() {
		return newUnits(c)
	}
	return newChildren(c)
}

// Program finds the leash's program: beside the running one, else in PATH.
func Program() (string, error) {
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), ProgramName)
		if _, err := exec.LookPath(beside); err == nil {
			return beside, nil
		}
	}
	found, err := exec.LookPath(ProgramName)
	if err != nil {
		return "", err
	}
	return filepath.Abs(found)
}

func name(op maint.OpID) string { return "belay-leash-" + string(op) }
