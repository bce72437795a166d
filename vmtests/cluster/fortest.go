package cluster

import (
	"context"
	"testing"
	"time"

	"belay/vmtests/lab"
)

// ForTest brings up a cluster for one test and takes it down after. The
// programs are those in $BELAY_BIN, or are built.
func ForTest(t testing.TB, c lab.Config) *Cluster {
	t.Helper()
	l := lab.ForTest(t, c)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	b, discard, err := Programs(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := discard(); err != nil {
			t.Error(err)
		}
	})
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
