package lab

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// toolPath is where programs are looked for. It is not the caller's PATH, which
// after a plain su has no /usr/sbin and so no libvirtd.
const toolPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// toolEnv is the environment of helpers and daemons: nothing of the caller's
// (LISTEN_FDS, LIBVIRT_DEBUG, a language) changes how a lab works.
func toolEnv() []string {
	return []string{"PATH=" + toolPath, "HOME=/root", "LC_ALL=C"}
}

func lookTool(name string) (string, error) {
	for _, dir := range filepath.SplitList(toolPath) {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s: %w in %s", name, fs.ErrNotExist, toolPath)
}

// tool prepares one of the programs that a lab needs; needs() lists them.
func tool(ctx context.Context, name string, args ...string) *exec.Cmd {
	path, err := lookTool(name)
	if err != nil {
		path = name // refused when it is started, by its name
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = toolEnv()
	cmd.Dir = "/"
	return cmd
}

// run runs a short helper; its error carries what the program said. The helper
// inherits the lab's lock, if this process has it: if this process is killed,
// nobody gets the lock, and cleans up, before the helper has made what it was
// making.
func (l *Lab) run(cmd *exec.Cmd) error {
	if l.lock != nil {
		cmd.ExtraFiles = []*os.File{l.lock}
	}
	out, err := cmd.CombinedOutput()
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", filepath.Base(cmd.Path), withText(err, out))
}

// ip runs ip-batch(8) commands inside the named network namespace, or in the
// machine's with an empty name.
func (l *Lab) ip(ctx context.Context, ns string, batch ...string) error {
	args := []string{"-batch", "-"}
	if ns != "" {
		args = append([]string{"-n", ns}, args...)
	}
	cmd := tool(ctx, "ip", args...)
	cmd.Stdin = strings.NewReader(strings.Join(batch, "\n") + "\n")
	return l.run(cmd)
}

// withText adds to an error what a program has said, if anything.
func withText(err error, said []byte) error {
	text := strings.TrimSpace(string(said))
	if text == "" {
		return err
	}
	return fmt.Errorf("%w: %s", err, text)
}
