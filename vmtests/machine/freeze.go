package machine

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"belay/vmtests/guest"
	"belay/vmtests/program"
)

// Two hosts that were provisioned and have nothing to do are frozen: their memory and devices
// into a file (QEMU's migration stream), beside their disk. Whoever wants such hosts has them
// a few seconds later, as often as need be, each time as they were then.

// frozenFormat is part of the key; raise it when hosts' QEMU gets other arguments.
const frozenFormat = "2"

// freezePoll is how often QEMU is asked how far it is.
const freezePoll = 100 * time.Millisecond

// frozen is the folder of hosts like these, which may not exist.
func (l *Lab) frozen(ctx context.Context, cache string, g guest.Image) (string, error) {
	deb, err := os.ReadFile(l.config.Package)
	if err != nil {
		return "", err
	}
	version, err := program.Output(ctx, "", l.qemuProgram(), "--version")
	if err != nil {
		return "", err
	}
	sum := sha256.New()
	fmt.Fprintln(sum, frozenFormat, new(Host).commandLine(), l.Image.Dir, g.Kernel, g.Initrd, l.config.MemoryMiB, version)
	sum.Write(provisionScript)
	sum.Write(deb)
	return filepath.Join(cache, "frozen-"+hex.EncodeToString(sum.Sum(nil)[:8])), nil
}

// freeze freezes all hosts, which are off then, into the folder. Others are removed: they were
// of another package.
func (l *Lab) freeze(ctx context.Context, dir string) error {
	old, err := filepath.Glob(filepath.Join(filepath.Dir(dir), "frozen-*"))
	if err != nil {
		return err
	}
	for _, o := range old {
		if err := os.RemoveAll(o); err != nil {
			return err
		}
	}
	begin := time.Now()
	tmp := filepath.Join(l.dir, "frozen")
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return err
	}
	if err := l.each(func(h *Host) error { return h.freeze(ctx, filepath.Join(tmp, h.Name)) }); err != nil {
		return err
	}
	err = errors.Join(os.Rename(l.payload, filepath.Join(tmp, "payload.img")), os.Rename(tmp, dir))
	l.config.Log.Info("hosts are frozen", "path", dir, "took", time.Since(begin).Round(time.Second))
	return err
}

func (h *Host) freeze(ctx context.Context, dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	// It may still be starting something.
	if _, err := h.Script(ctx, "systemctl is-system-running --wait >&2 || true; sync"); err != nil {
		return fmt.Errorf("freeze %s: %w", h.Name, err)
	}
	for _, c := range []struct {
		command string
		args    map[string]any
	}{
		// QEMU's emulation before 9.0 loses what is written while it is sent.
		{"stop", nil},
		{"migrate-set-parameters", map[string]any{"max-bandwidth": 8 << 30}},
		{"migrate", map[string]any{"uri": "exec:cat >'" + filepath.Join(dir, "state") + "'"}},
	} {
		if _, err := qmp(ctx, h.file("qmp"), c.command, c.args); err != nil {
			return fmt.Errorf("freeze %s: %w", h.Name, err)
		}
	}
	if err := h.awaitQEMU(ctx, "query-migrate", "completed"); err != nil {
		return fmt.Errorf("freeze %s: %w", h.Name, err)
	}
	// QEMU has flushed the disk, and does not write to it any more.
	return errors.Join(h.Cut(), os.Rename(h.file("disk.qcow2"), filepath.Join(dir, "disk.qcow2")))
}

// awaitQEMU waits until the query says that the status is so.
func (h *Host) awaitQEMU(ctx context.Context, query, status string) error {
	for {
		b, err := qmp(ctx, h.file("qmp"), query, nil)
		var now struct{ Status string }
		if err == nil {
			err = json.Unmarshal(b, &now)
		}
		if err != nil || now.Status == status {
			return err
		}
		if now.Status == "failed" {
			return fmt.Errorf("QEMU: %s: %s", query, b)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("QEMU: %s: %s: %w", query, b, context.Cause(ctx))
		case <-time.After(freezePoll):
		}
	}
}

// thaw takes up the hosts that were frozen into the folder, with disks of their own on top of
// those.
func (l *Lab) thaw(ctx context.Context, dir string) error {
	if err := l.plug(l.config.Hosts); err != nil {
		return err
	}
	l.payload = filepath.Join(dir, "payload.img")
	return l.each(func(h *Host) error {
		begin := time.Now()
		if err := h.thaw(ctx, filepath.Join(dir, h.Name)); err != nil {
			return fmt.Errorf("thaw %s: %w", h.Name, err)
		}
		l.config.Log.Info("host goes on where it was frozen", "host", h.Name, "took", time.Since(begin).Round(100*time.Millisecond))
		return nil
	})
}

func (h *Host) thaw(ctx context.Context, dir string) error {
	if err := h.addDisk(ctx, filepath.Join(dir, "disk.qcow2"), "qcow2"); err != nil {
		return err
	}
	h.incoming = []string{"-incoming", "exec:cat '" + filepath.Join(dir, "state") + "'"}
	defer func() { h.incoming = nil }()
	if err := h.Start(ctx); err != nil {
		return err
	}
	if err := h.awaitQEMU(ctx, "query-status", "paused"); err != nil {
		return err
	}
	if _, err := qmp(ctx, h.file("qmp"), "cont", nil); err != nil {
		return err
	}
	if _, err := h.AwaitUp(ctx, ""); err != nil {
		return err
	}
	// Its clock has stood still.
	now := strconv.FormatFloat(float64(time.Now().UnixMilli())/1000, 'f', 3, 64)
	_, err := h.Run(ctx, "date", "--set", "@"+now)
	return err
}
