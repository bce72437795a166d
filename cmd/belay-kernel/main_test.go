package main

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/patch/live/livetest"
	"belay/patch/live/remote"
)

// TestMain is belay-kernel itself where a test starts it so.
func TestMain(m *testing.M) {
	if os.Getenv("BELAY_TEST_KERNEL") != "" {
		os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

// serve accepts as systemd does, and starts belay-kernel for each connection.
func serve(t *testing.T, args ...string) *remote.Client {
	t.Helper()
	dir, err := os.MkdirTemp("", "kernel")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			f, err := conn.File()
			conn.Close()
			if err != nil {
				return
			}
			// sh, since LISTEN_PID is only known in the child.
			c := exec.Command("sh", append([]string{"-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" "$@"`, os.Args[0]}, args...)...)
			c.Env, c.ExtraFiles, c.Stderr = append(os.Environ(), "BELAY_TEST_KERNEL=1"), []*os.File{f}, os.Stderr
			_ = c.Run() // the asker is told
			f.Close()
		}
	}()
	return &remote.Client{Socket: l.Addr().String()}
}

func TestAnswers(t *testing.T) {
	t.Parallel()
	keys, v := t.TempDir(), livetest.NewVendor(t)
	v.Trust(keys)
	c := serve(t, "-keys", keys)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := c.Tasks(ctx, nil); err != nil {
		t.Errorf("it does not look at tasks: %v", err)
	}
	var p *maint.Problem
	if err := c.Load(ctx, livetest.NewVendor(t).Make("fix_a", "none", "none", nil)); !errors.As(err, &p) || p.Code != maint.CodePatchSigned {
		t.Errorf("a livepatch that nobody trusted has signed: %v", err)
	}
	var r *maint.Refusal
	if err := c.Load(ctx, v.Make("fix_a", "none", "none", nil)); !errors.As(err, &r) || r.Problems[0].Code != maint.CodeWrongKernel {
		t.Errorf("a livepatch for another kernel: %v", err)
	}
}

func TestFlags(t *testing.T) {
	t.Parallel()
	for want, args := range map[int][]string{0: {"-version"}, 2: {"-user", "nobody-of-that-name"}, 1: nil} {
		if got := run(args, os.Stderr, os.Stderr); got != want {
			t.Errorf("belay-kernel %v ends with %d, want %d", args, got, want)
		}
	}
}
