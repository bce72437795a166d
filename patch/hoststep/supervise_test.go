package hoststep_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"belay/patch/hoststep"
)

// superviseAlone runs a supervisor in a folder, until it ends by itself.
func superviseAlone(t *testing.T, dir string) (said string, err error) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	var out bytes.Buffer
	c := exec.CommandContext(ctx, self, hoststep.SuperviseArg, dir)
	c.Stdout, c.Stderr = &out, &out
	if err = c.Run(); ctx.Err() != nil {
		t.Fatalf("it hangs; it said %q", &out)
	}
	return out.String(), err
}

// TestASpecificationThatIsNone: nothing is listened for, and nothing hangs.
func TestASpecificationThatIsNone(t *testing.T) {
	t.Parallel()
	write := func(content string) func(file string) error {
		return func(file string) error { return os.WriteFile(file, []byte(content), 0o600) }
	}
	for name, c := range map[string]struct {
		put  func(file string) error
		want string
	}{
		"no command":    {write(`{"step":{},"token":"x","wait_ns":60000000000}`), "has no command"},
		"empty command": {write(`{"step":{"command":[]},"token":"x","wait_ns":60000000000}`), "has no command"},
		"unit":          {write(`{"step":{"unit":"a.service"},"token":"x","wait_ns":60000000000}`), "has no command"},
		"pipe":          {func(file string) error { return unix.Mkfifo(file, 0o600) }, "not a file"},
		"device":        {func(file string) error { return os.Symlink("/dev/zero", file) }, "not a file"},
		"large":         {write(`{"token":"` + strings.Repeat("x", 5<<20) + `"}`), "more than"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			if err := c.put(filepath.Join(dir, "spec.json")); err != nil {
				t.Fatal(err)
			}
			said, err := superviseAlone(t, dir)
			if err == nil || !strings.Contains(said, c.want) || strings.Contains(said, "goroutine") {
				t.Errorf("it said %.500q, %v", said, err)
			}
			if _, err := os.Lstat(filepath.Join(dir, "sock")); !os.IsNotExist(err) {
				t.Errorf("its socket: %v", err)
			}
		})
	}
}

// TestUnknownRequests are not answered, and do not keep it from what is asked.
func TestUnknownRequests(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	h.prepare("mig-1-step", "exit 3")
	for _, q := range []string{`{}`, `{"ask":"Look"}`, `{"ask":"stop"}`, `{"ask":""}`} {
		c, err := net.Dial("unix", h.sock("mig-1-step"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write([]byte(q + "\n")); err != nil {
			t.Error(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
		if answer, err := io.ReadAll(c); err != nil || len(answer) > 0 {
			t.Errorf("%s is answered %q, %v", q, answer, err)
		}
		c.Close()
	}
	if now, err := h.Look(t.Context(), "mig-1-step"); err != nil || !now.Started.IsZero() {
		b, _ := json.Marshal(now)
		t.Errorf("Look: %s, %v", b, err)
	}
	h.wantEnded(h.sh(t.Context(), "mig-1-step", "exit 4"), 3)
}
