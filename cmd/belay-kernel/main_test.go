package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/patch/live"
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
	return serveBy(t, nil, args...)
}

// serveBy has belay-kernel be started by another program.
func serveBy(t *testing.T, by []string, args ...string) *remote.Client {
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
			line := append(slices.Clone(by), "sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" "$@"`, os.Args[0])
			c := exec.Command(line[0], append(line[1:], args...)...)
			c.Env, c.ExtraFiles, c.Stderr = append(os.Environ(), "BELAY_TEST_KERNEL=1"), []*os.File{f}, os.Stderr
			go func() {
				_ = c.Run() // the asker is told
				f.Close()
			}()
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

// TestPatchesQEMU: belay-kernel patches real QEMUs that libvirt has as guests'. Its own /run is
// libvirt's.
func TestPatchesQEMU(t *testing.T) {
	t.Parallel()
	root, err := os.MkdirTemp("", "qemus") // QEMU, another user, can look into it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	if err := os.Chmod(root, 0o755); err != nil {
		t.Fatal(err)
	}
	path := func(name string) string { return filepath.Join(root, name) }
	target, v := livetest.BuildTarget(t, path("lib")), livetest.NewVendor(t)
	v.Trust(path("keys"))
	start := func(guest string, stock bool) live.QEMU {
		pid := livetest.StartQEMU(t, target, path(guest), stock)
		file := path("run/libvirt/qemu/" + guest + ".pid")
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(strconv.Itoa(pid)), 0o644)); err != nil {
			t.Fatal(err)
		}
		stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if err != nil {
			t.Fatal(err)
		}
		began, err := strconv.ParseUint(strings.Fields(string(stat[bytes.LastIndexByte(stat, ')'):]))[20], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return live.QEMU{Guest: guest, PID: pid, Start: began}
	}
	q, stock := start("web-1", false), start("web-2", true)
	c := serveBy(t, []string{"unshare", "--mount", "sh", "-c", `mount --bind "$0" /run && exec "$@"`, path("run")}, "-keys", path("keys"), "-containers", path("containers"))
	other := target.Manifest
	other.BuildID = strings.Repeat("a", 40)
	livetest.UserContract(t, livetest.UserSubject{UserSpace: c, QEMU: q, Stock: stock, Fits: v.VouchContainer(target.Container, target.Manifest),
		Other: v.VouchContainer(target.Container, other), Foreign: livetest.NewVendor(t).VouchContainer(target.Container, target.Manifest),
		Effect: func() bool { return livetest.Asked(t, path("web-1")) == 2 },
		End: func() {
			if err := os.Remove(path("run/libvirt/qemu/web-1.pid")); err != nil {
				t.Fatal(err)
			}
		}})
	if answer := livetest.Asked(t, path("web-1")); answer != 1 {
		t.Errorf("it goes on with %d", answer)
	}
}
