package twin

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// hookBed is a twin's folder as the hooks see it.
type hookBed struct {
	t    *testing.T
	root string
	hook string
}

const hookUUID = "4dea22b3-1d52-d8f3-2516-782e98ab3fa0"

// call runs a hook as libvirt does.
func (b *hookBed) call(op, sub, options string) error {
	b.t.Helper()
	cmd := exec.Command("sh", b.hook, "web-1", op, sub, "-")
	cmd.Stdin = strings.NewReader("<domain type='kvm' id='7' xmlns:qemu='x'>\n  <name>web-1</name>\n  <uuid>" + hookUUID + "</uuid>\n  <sysinfo><entry name='uuid'>x</entry></sysinfo>\n" +
		options + "  <other><uuid>no</uuid></other>\n</domain>\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

func newHookBed(t *testing.T, side string) *hookBed {
	b := &hookBed{t: t, root: filepath.Join(t.TempDir(), "twin"), hook: filepath.Join(t.TempDir(), "hook")}
	text := HomeHook(b.root)
	if side == inTwin {
		text = twinHook(b.root)
	}
	for _, dir := range []string{"link/home", "link/twin", "coming", "run/qemu"} {
		if err := os.MkdirAll(filepath.Join(b.root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(b.hook, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	return b
}

func tokenXML(token string) string {
	return "<qemu:commandline>\n    <qemu:arg value='-incoming'/>\n    <qemu:env name='BELAY_TWIN' value='" + token + "'/>\n</qemu:commandline>\n"
}

func TestHookGuards(t *testing.T) {
	t.Parallel()
	b := newHookBed(t, atHome)
	if err := b.call("prepare", "begin", ""); err != nil {
		t.Errorf("an ordinary start: %v", err)
	}
	seen, err := os.ReadDir(hookedDir(b.root))
	if err != nil || len(seen) != 1 || seen[0].Name() != strconv.Itoa(os.Getpid()) {
		t.Errorf("who has called the hook: %v, %v", seen, err)
	}
	qemu := exec.Command("sh", "-c", "sleep 60; :", hookUUID)
	if err := qemu.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = qemu.Process.Kill(); _ = qemu.Wait() }()
	pidFile := filepath.Join(b.root, "run/qemu/web-1.pid")
	if err := os.WriteFile(pidFile, []byte(strconv.Itoa(qemu.Process.Pid)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := b.call("prepare", "begin", ""); err == nil || !strings.Contains(err.Error(), "runs already, in Belay's twin") {
		t.Errorf("a second start: %v", err)
	}
	if err := b.call("release", "end", ""); err != nil {
		t.Errorf("another operation: %v", err)
	}
	// It comes home by migration, once.
	if err := errors.Join(b.call("migrate", "begin", ""), b.call("prepare", "begin", "")); err != nil {
		t.Errorf("it comes home: %v", err)
	}
	if err := b.call("prepare", "begin", ""); err == nil {
		t.Error("a second start after an announced one")
	}
	if err := b.call("migrate", "begin", ""); err != nil {
		t.Error(err)
	}
	old := time.Now().Add(-2 * time.Minute)
	if err := os.Chtimes(filepath.Join(b.root, "coming", hookUUID), old, old); err != nil {
		t.Fatal(err)
	}
	if err := b.call("prepare", "begin", ""); err == nil {
		t.Error("a second start long after an announced one")
	}
	// Or prewarmed, with the token of the order.
	if err := os.WriteFile(filepath.Join(b.root, "link/home", hookUUID), []byte("tok\n/rams\n/file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := b.call("prepare", "begin", tokenXML("tok")); err != nil {
		t.Errorf("prewarmed: %v", err)
	}
	if err := b.call("prepare", "begin", tokenXML("old")); err == nil {
		t.Error("a start with an old token")
	}
	// A stale pid file is no guest.
	if err := os.WriteFile(pidFile, []byte(strconv.Itoa(os.Getpid())), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := b.call("prepare", "begin", ""); err != nil {
		t.Errorf("a start when the twin's QEMU is gone: %v", err)
	}
}

func TestHookLinks(t *testing.T) {
	t.Parallel()
	for _, side := range []string{atHome, inTwin} {
		b := newHookBed(t, side)
		rams := filepath.Join(t.TempDir(), "ra ms")
		file := filepath.Join(t.TempDir(), "pc ram")
		mine := filepath.Join(rams, "7-web-1")
		if err := errors.Join(os.MkdirAll(mine, 0o700), os.WriteFile(file, []byte("memory"), 0o600)); err != nil {
			t.Fatal(err)
		}
		order := filepath.Join(b.root, "link", side, hookUUID)
		linked := filepath.Join(mine, "pc ram")
		is := func() bool { same, err := sameFiles([]string{file}, []string{linked}); return same && err == nil }
		if err := b.call("start", "begin", tokenXML("tok")); err != nil || is() {
			t.Errorf("%s: without an order: %v", side, err)
		}
		if err := os.WriteFile(order, []byte("tok\n"+rams+"\n"+file+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := b.call("start", "begin", tokenXML("other")); err != nil || is() {
			t.Errorf("%s: another QEMU: %v", side, err)
		}
		if err := b.call("start", "begin", tokenXML("tok")); err != nil || !is() {
			t.Errorf("%s: it does not have the guest's memory: %v", side, err)
		}
		if err := b.call("start", "begin", tokenXML("tok")); err == nil {
			t.Errorf("%s: a memory file that is there already was taken", side)
		}
		if err := os.RemoveAll(mine); err != nil {
			t.Fatal(err)
		}
		if err := b.call("start", "begin", tokenXML("tok")); err == nil || !strings.Contains(err.Error(), "keeps memory elsewhere") {
			t.Errorf("%s: without a folder: %v", side, err)
		}
	}
}
