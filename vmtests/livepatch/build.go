package livepatch

import (
	"bytes"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

//go:embed build.sh modules
var sources embed.FS

// Set are the modules for one kernel.
type Set struct {
	Dir              string // has NAME.ko of each
	Release, Version string // the kernel's: uname -r and -v
}

// Build returns the modules for a kernel of Debian 12, given by its image, making them in
// cacheDir if they are not there. That takes ten seconds, gcc-12, make, and apt's mirror for
// the kernel's headers, which are not installed.
func Build(ctx context.Context, cacheDir, vmlinuz string, log *slog.Logger) (Set, error) {
	s, err := build(ctx, cacheDir, vmlinuz, log)
	if err != nil {
		return Set{}, fmt.Errorf("build modules for the kernel %s: %w", vmlinuz, err)
	}
	return s, nil
}

// debian is the package's version in uname -v: "#1 SMP PREEMPT_DYNAMIC Debian 6.1.192-2 (2026-11-16)".
var debian = regexp.MustCompile(` Debian ([^ ]+) `)

func build(ctx context.Context, cacheDir, vmlinuz string, log *slog.Logger) (s Set, err error) {
	if s.Release, s.Version, err = kernel(vmlinuz); err != nil {
		return s, err
	}
	pkg := debian.FindStringSubmatch(s.Version)
	if pkg == nil {
		return s, fmt.Errorf("it is no kernel of Debian's: %q", s.Version)
	}
	if s.Dir, err = dir(cacheDir, s.Release, s.Version); err != nil {
		return s, err
	}
	if _, err := os.Stat(s.Dir); !errors.Is(err, fs.ErrNotExist) {
		return s, err
	}
	begin := time.Now()
	if err := os.MkdirAll(cacheDir, 0o755); err != nil {
		return s, err
	}
	tmp, err := os.MkdirTemp(cacheDir, "new-livepatch-")
	if err != nil {
		return s, err
	}
	defer os.RemoveAll(tmp)
	if err := os.CopyFS(filepath.Join(tmp, "sources"), sources); err != nil {
		return s, err
	}
	out := filepath.Join(tmp, "out")
	if err := os.Mkdir(out, 0o755); err != nil {
		return s, err
	}
	script, from := filepath.Join(tmp, "sources", "build.sh"), filepath.Join(tmp, "sources", "modules")
	if said, err := exec.CommandContext(ctx, "sh", script, out, from, s.Release, pkg[1]).CombinedOutput(); err != nil {
		return s, fmt.Errorf("build.sh: %w: %s", err, said)
	}
	// Another process may have been quicker: its modules are as good.
	if err := os.Rename(out, s.Dir); err != nil && !errors.Is(err, fs.ErrExist) {
		return s, err
	}
	log.Info("modules built", "path", s.Dir, "took", time.Since(begin).Round(time.Second))
	return s, nil
}

// dir is where the modules of the present sources for a kernel are.
func dir(cacheDir, release, version string) (string, error) {
	sum := sha256.New()
	fmt.Fprintf(sum, "%s %s\n", release, version)
	err := fs.WalkDir(sources, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := sources.ReadFile(path)
		fmt.Fprintf(sum, "%s %d\n%s", path, len(b), b)
		return err
	})
	return filepath.Join(cacheDir, "livepatch-"+hex.EncodeToString(sum.Sum(nil)[:8])), err
}

// kernel reads uname -r and -v out of a kernel's image (Documentation/arch/x86/boot.rst,
// kernel_version): "RELEASE (whoever built it) VERSION".
func kernel(vmlinuz string) (release, version string, err error) {
	f, err := os.Open(vmlinuz)
	if err != nil {
		return "", "", err
	}
	defer f.Close()
	head := make([]byte, 64<<10)
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		return "", "", err
	}
	if head = head[:n]; n < 0x210 || string(head[0x202:0x206]) != "HdrS" {
		return "", "", errors.New("it is no bzImage")
	}
	at := min(n, int(binary.LittleEndian.Uint16(head[0x20e:]))+0x200)
	text, _, _ := bytes.Cut(head[at:], []byte{0})
	release, rest, _ := strings.Cut(string(text), " ")
	_, version, found := strings.Cut(rest, ") ")
	if !found {
		return "", "", fmt.Errorf("it says no more of itself than %q", text)
	}
	return release, version, nil
}
