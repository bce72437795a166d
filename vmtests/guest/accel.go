package guest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"belay/vmtests/imagecache"
	"belay/vmtests/program"
)

// Accel is how a guest's CPU is made.
type Accel string

// The accelerators. Their values are those of BELAY_ACCEL.
const (
	TCG Accel = "tcg" // emulation: works everywhere
	KVM Accel = "kvm"
)

const (
	qemuProgram = "qemu-system-x86_64"
	// upMarker is what init.sh prints when user space runs.
	upMarker = "belay-init: up"
	// kvmTimeout is how long a guest may take to boot under a KVM that
	// works; it takes one or two seconds.
	kvmTimeout = 8 * time.Second
)

// verdict is the cached answer of DetectAccel.
type verdict struct {
	Boot   string `json:"boot_id"`
	QEMU   string `json:"qemu"`
	Accel  Accel  `json:"accel"`
	Reason string `json:"reason"`
}

// DetectAccel decides between KVM and TCG, and says why. That /dev/kvm can be
// opened proves little: nested and filtered implementations take a guest and
// never run it. So the image is booted under KVM and has to print its marker
// in time. The answer is kept in the image's cache until the machine boots or
// QEMU changes. BELAY_ACCEL=tcg or kvm overrides. The error is of ctx, of a
// wrong BELAY_ACCEL or of a QEMU that does not run at all.
func DetectAccel(ctx context.Context, img Image, log *slog.Logger) (Accel, string, error) {
	switch a := Accel(os.Getenv("BELAY_ACCEL")); a {
	case TCG, KVM:
		return a, "BELAY_ACCEL", nil
	case "":
	default:
		return "", "", fmt.Errorf("BELAY_ACCEL=%s: want tcg or kvm", a)
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", "", fmt.Errorf("choose accelerator: %w", err)
	}
	version, err := program.Output(ctx, "", qemuProgram, "--version")
	if err != nil {
		return "", "", fmt.Errorf("choose accelerator: %w", err)
	}
	first, _, _ := strings.Cut(version, "\n")
	v := verdict{Boot: strings.TrimSpace(string(boot)), QEMU: first}

	cache := filepath.Join(filepath.Dir(filepath.Dir(img.Kernel)), "accel.json")
	unlock, err := imagecache.Lock(ctx, cache+".lock") // one trial at a time: they slow each other down
	if err != nil {
		return "", "", fmt.Errorf("choose accelerator: %w", err)
	}
	defer unlock()
	if b, err := os.ReadFile(cache); err == nil {
		var old verdict
		if json.Unmarshal(b, &old) == nil && old.Boot == v.Boot && old.QEMU == v.QEMU {
			return old.Accel, old.Reason, nil
		}
	}

	start := time.Now()
	err = tryKVM(ctx, img)
	switch {
	case ctx.Err() != nil:
		return "", "", fmt.Errorf("choose accelerator: %w", ctx.Err())
	case err != nil:
		v.Accel, v.Reason = TCG, "KVM does not work: "+err.Error()
	default:
		v.Accel, v.Reason = KVM, fmt.Sprintf("a guest booted under KVM in %v", time.Since(start).Round(time.Millisecond))
	}
	log.Info("accelerator chosen", "accel", v.Accel, "reason", v.Reason)
	b, err := json.MarshalIndent(v, "", "\t")
	if err == nil {
		err = writeFile(cache, b)
	}
	if err != nil {
		log.Warn("accelerator will be tried again next time", "err", err)
	}
	return v.Accel, v.Reason, nil
}

// writeFile replaces a file in one step.
func writeFile(name string, b []byte) error {
	if err := os.WriteFile(name+".new", b, 0o644); err != nil {
		return err
	}
	return os.Rename(name+".new", name)
}

// tryKVM boots the image under KVM until it prints its marker.
func tryKVM(ctx context.Context, img Image) error {
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err != nil {
		return err
	} else {
		f.Close()
	}
	ctx, cancel := context.WithTimeout(ctx, kvmTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, qemuProgram, "-accel", "kvm", "-machine", Machine, "-cpu", "host", "-m", "128",
		"-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio",
		"-kernel", img.Kernel, "-initrd", img.Initrd, "-append", baseCmdline)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.WaitDelay = time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	found := contains(out, upMarker)
	timedOut := ctx.Err() != nil
	cancel() // kills it; then Wait's error says nothing new
	waitErr := cmd.Wait()
	switch {
	case found:
		return nil
	case timedOut:
		return fmt.Errorf("the guest did not come up in %v", kvmTimeout)
	}
	said := strings.ReplaceAll(strings.TrimSpace(stderr.String()), "\n", "; ")
	return fmt.Errorf("QEMU ended: %w: %s", waitErr, said)
}

// contains reads r until the marker or the end.
func contains(r io.Reader, marker string) bool {
	var tail []byte
	buf := make([]byte, 4096)
	for {
		n, err := r.Read(buf)
		tail = append(tail, buf[:n]...)
		if bytes.Contains(tail, []byte(marker)) {
			return true
		}
		if err != nil {
			return false
		}
		if keep := len(marker); len(tail) > keep {
			tail = append(tail[:0], tail[len(tail)-keep:]...)
		}
	}
}
