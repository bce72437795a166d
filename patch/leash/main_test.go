package leash

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"belay/agent/boottime"
	"belay/agent/maint"
)

// asLeash and asHolder, in the environment of this test binary, make it a leash
// or a belayd that arms one: processes that can be killed.
const (
	asLeash  = "BELAY_TEST_LEASH"
	asHolder = "BELAY_TEST_HOLDER"
)

func TestMain(m *testing.M) {
	switch dir := os.Getenv(asLeash); {
	case dir != "":
		if err := leashProcess(dir, maint.OpID(os.Args[1])); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	case os.Getenv(asHolder) != "":
		if err := holderProcess(os.Getenv(asHolder)); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		select {} // until it is killed
	default:
		os.Exit(m.Run())
	}
}

// leashProcess is cmd/belay-leash on guests that are files.
func leashProcess(dir string, op maint.OpID) error {
	warnings := Harden()
	signal.Ignore(syscall.SIGPIPE, syscall.SIGHUP, syscall.SIGINT)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	l, closeListener, err := Listen(filepath.Join(dir, "leash"), op)
	if err != nil {
		return err
	}
	defer closeListener()
	boot, err := boottime.ID()
	if err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	k, err := NewKeeper(Config{Dir: filepath.Join(dir, "leash"), Op: op, Boot: boot, Host: filed(dir), Clock: boottime.Now,
		Warnings: warnings, Log: slog.New(slog.NewTextHandler(log, nil)).With("pid", os.Getpid()),
		Monitor: func(context.Context, string) (Monitor, error) { return nil, errors.New("there is none") }})
	if err != nil {
		return err
	}
	pid := filepath.Join(dir, "pid")
	if err := errors.Join(os.WriteFile(pid+".new", fmt.Append(nil, os.Getpid()), 0o600), os.Rename(pid+".new", pid)); err != nil {
		return err
	}
	return k.Run(ctx, l)
}

// filed is libvirt for guests that are files of a folder: guest-UUID is
// "running", or "paused".
type filed string

func (f filed) file(uuid string) string { return filepath.Join(string(f), "guest-"+uuid) }

func (f filed) State(_ context.Context, uuid string) (maint.GuestState, string, error) {
	b, err := os.ReadFile(f.file(uuid))
	if errors.Is(err, fs.ErrNotExist) {
		return "", "", fmt.Errorf("%w: %w", maint.ErrNoGuest, err)
	}
	return maint.GuestState(strings.TrimSpace(string(b))), "user", err
}

func (f filed) Suspend(_ context.Context, uuid string) error { return f.set(uuid, "paused") }
func (f filed) Resume(_ context.Context, uuid string) error  { return f.set(uuid, "running") }

func (f filed) set(uuid, state string) error {
	if err := os.WriteFile(f.file(uuid)+".new", []byte(state), 0o600); err != nil {
		return err
	}
	return os.Rename(f.file(uuid)+".new", f.file(uuid))
}
