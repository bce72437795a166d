package cluster

import (
	"context"
	"os"
	"testing"
	"time"

	"belay/vmtests/lab"
)

// ForTest brings up a cluster for one test and takes it down after. The
// programs are those in $BELAY_BIN, or are built.
func ForTest(t testing.TB, c lab.Config) *Cluster {
	t.Helper()
	l := lab.ForTest(t, c)
	bin := t.TempDir()
	var b Binaries
	var err error
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	if dir := os.Getenv("BELAY_BIN"); dir != "" {
		b = Binaries{dir + "/belay", dir + "/belayd"}
	} else if b, err = Build(ctx, bin); err != nil {
		t.Fatal(err)
	}
	cl, err := Up(ctx, l, b)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cl.Down(); err != nil {
			t.Error(err)
		}
	})
	return cl
}
