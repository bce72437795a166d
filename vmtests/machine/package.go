package machine

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"belay/vmtests/program"
)

// BuildPackage builds Belay's Debian package for hosts in a new folder in dir, and returns
// its path. The version is that of the sources, or the given one.
func BuildPackage(ctx context.Context, dir, version string) (string, error) {
	mod, err := program.Output(ctx, "", "go", "env", "GOMOD")
	if err != nil {
		return "", err
	}
	out, err := os.MkdirTemp(dir, "package-")
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(filepath.Dir(strings.TrimSpace(mod)), "dist/package/build"), out)
	if version != "" {
		cmd.Env = append(os.Environ(), "BELAY_VERSION="+version)
	}
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build Belay's package: %w: %s", err, text)
	}
	debs, err := filepath.Glob(filepath.Join(out, "belay_*.deb"))
	if err != nil || len(debs) != 1 {
		return "", fmt.Errorf("build Belay's package: %d packages in %s, want 1", len(debs), out)
	}
	return debs[0], nil
}
