package lab

import (
	"context"
	"crypto/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const (
	// upTimeout and downTimeout bound a test's waiting on a busy machine.
	upTimeout   = 3 * time.Minute
	downTimeout = time.Minute
)

// ForTest brings up a lab for one test and takes it down when the test ends. A
// lab without a name gets a random one, so that tests can run side by side. If
// the test has failed by then, the hosts' logs are kept in a folder named after
// the test, below $BELAY_ARTIFACTS or, if that is not set, below the temporary
// folder's belay-artifacts, and the test's log says where.
//
// A test that cannot have its lab fails. With BELAY_LAB=skip in the environment
// it is skipped instead.
func ForTest(t testing.TB, c Config) *Lab {
	t.Helper()
	if os.Getenv("BELAY_LAB") == "skip" {
		t.Skip("BELAY_LAB=skip: tests that need a lab are left out")
	}
	if c.Name == "" {
		c.Name = "t" + strings.ToLower(rand.Text()[:8])
	}
	ctx, cancel := context.WithTimeout(t.Context(), upTimeout)
	defer cancel()
	l, err := Up(ctx, c)
	if err != nil {
		t.Fatalf("%v\n(BELAY_LAB=skip leaves out the tests that need a lab)", err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			dir := artifacts(t.Name())
			if err := l.CollectLogs(dir); err != nil {
				t.Errorf("cannot keep the lab's logs: %v", err)
			}
			t.Logf("the lab's logs are in %s", dir)
		}
		// The test's own context has ended by now.
		ctx, cancel := context.WithTimeout(context.Background(), downTimeout)
		defer cancel()
		if err := l.Down(ctx); err != nil {
			t.Error(err)
		}
	})
	return l
}

func artifacts(test string) string {
	base := os.Getenv("BELAY_ARTIFACTS")
	if base == "" {
		base = filepath.Join(os.TempDir(), "belay-artifacts")
	}
	return filepath.Join(base, strings.ReplaceAll(test, "/", "_"))
}
