package machine

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// upTimeout bounds a test's waiting for its hosts on a busy machine: for another lab to end,
// for the image and for two hosts to boot. logsTimeout is for what a host is asked when a
// test has failed.
const upTimeout, logsTimeout = 20 * time.Minute, time.Minute

// ForTest brings up a lab for one test and takes it down when the test ends. If the test has
// failed by then, the hosts' consoles and journals are kept in a folder named after the test
// below $BELAY_ARTIFACTS, or else below the temporary folder's belay-artifacts; a kernel that
// panicked is named.
//
// Without BELAY_MACHINES=1 in the environment (make vmtest sets it) the test is skipped: a
// lab takes all of a small machine for minutes.
func ForTest(t testing.TB, c Config) *Lab {
	t.Helper()
	if os.Getenv("BELAY_MACHINES") != "1" {
		t.Skip("hosts that are whole machines are for BELAY_MACHINES=1 only (make vmtest)")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	ctx, cancel := context.WithTimeout(t.Context(), upTimeout)
	defer cancel()
	l := &Lab{config: c}
	t.Cleanup(func() {
		if t.Failed() {
			l.tellPanics(t)
			dir := artifacts(t.Name())
			ctx, cancel := context.WithTimeout(context.Background(), logsTimeout)
			defer cancel()
			if err := l.CollectLogs(ctx, dir); err != nil {
				t.Errorf("not all of the hosts' logs could be kept: %v", err)
			}
			t.Logf("the hosts' logs are in %s", dir)
		}
		if err := l.Down(); err != nil {
			t.Error(err)
		}
	})
	if err := l.up(ctx); err != nil {
		t.Fatalf("cannot bring up the hosts: %v", err)
	}
	return l
}

// tellPanics names kernels that panicked: emulated virtualisation is not without faults.
func (l *Lab) tellPanics(t testing.TB) {
	for _, h := range l.Hosts {
		for _, line := range h.panics() {
			t.Logf("the kernel of %s has panicked. If the test did not mean it to, it may be the emulation: run the test again. %s", h.Name, strings.TrimSpace(line))
		}
	}
}

func artifacts(test string) string {
	base := os.Getenv("BELAY_ARTIFACTS")
	if base == "" {
		base = filepath.Join(os.TempDir(), "belay-artifacts")
	}
	return filepath.Join(base, strings.ReplaceAll(test, "/", "_"))
}
