package guest

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"belay/vmtests/imagecache"
)

// imageFormat is part of an image's key; raise it when the builder's own code
// makes another image of the same inputs.
const imageFormat = "1"

//go:embed init.sh
var initScript []byte

//go:embed shutdown.sh
var shutdownScript []byte

//go:embed inittab
var inittab []byte

// Image is what a guest boots from, by direct kernel boot.
type Image struct {
	Kernel string // path of a bzImage
	Initrd string // path of an initramfs
	// QEMU is for lab.Config.QEMU: the QEMU to run it with, empty for the
	// machine's own. See Prepare.
	QEMU string
}

// DefaultCache is $BELAY_CACHE, or /var/cache/belay.
func DefaultCache() string {
	if dir := os.Getenv("BELAY_CACHE"); dir != "" {
		return dir
	}
	return "/var/cache/belay"
}

// Build returns the guest image for the present sources, making it in cacheDir
// if it is not there. It needs a Debian machine with busybox-static,
// qemu-guest-agent and util-linux-extra, and the go command with this module
// as its working directory's. The kernel package is fetched with apt-get once;
// after that no network is asked. Builders in other processes are waited for.
func Build(ctx context.Context, cacheDir string, log *slog.Logger) (Image, error) {
	img, err := build(ctx, cacheDir, log)
	if err != nil {
		return Image{}, fmt.Errorf("build guest image: %w", err)
	}
	return img, nil
}

func build(ctx context.Context, cacheDir string, log *slog.Logger) (img Image, err error) {
	if cacheDir, err = filepath.Abs(cacheDir); err != nil {
		return img, err
	}
	if err := os.MkdirAll(cacheDir, 0o755); err != nil {
		return img, err
	}
	unlock, err := imagecache.Lock(ctx, filepath.Join(cacheDir, "image.lock"))
	if err != nil {
		return img, err
	}
	defer unlock()

	deb, err := fetchKernel(ctx, cacheDir, log)
	if err != nil {
		return img, err
	}
	files, err := guestFiles(ctx, cacheDir)
	if err != nil {
		return img, err
	}
	dir := filepath.Join(cacheDir, "image-"+key(deb, files))
	img = Image{Kernel: filepath.Join(dir, "vmlinuz"), Initrd: filepath.Join(dir, "initrd")}
	now := time.Now()
	if err := os.Chtimes(dir, now, now); err == nil {
		return img, nil
	} else if !errors.Is(err, os.ErrNotExist) {
		return img, err
	}

	k, err := readKernel(ctx, deb)
	if err != nil {
		return img, err
	}
	tmp, err := os.MkdirTemp(cacheDir, "new-image-")
	if err != nil {
		return img, err
	}
	defer os.RemoveAll(tmp) // no longer there when all went well
	initrd := initramfs(k, files)
	err = errors.Join(
		os.WriteFile(filepath.Join(tmp, "vmlinuz"), k.vmlinuz, 0o644),
		os.WriteFile(filepath.Join(tmp, "initrd"), initrd, 0o644),
		os.Chmod(tmp, 0o755),
	)
	if err != nil {
		return img, err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return img, err
	}
	log.Info("guest image built", "path", dir, "kernel", k.pkg, "initrd_bytes", len(initrd), "took", time.Since(now))
	imagecache.Prune(cacheDir, "image-*", log) // each change of the probe makes a new one
	return img, nil
}

// guestFile is a regular file of the initramfs.
type guestFile struct {
	name string // without leading slash
	perm uint32
	body []byte
}

// hostPrograms are taken from the machine, with their libraries.
var hostPrograms = [...]struct{ program, inGuest, debian string }{
	{"busybox", "bin/busybox", "busybox-static"},
	{"qemu-ga", "usr/sbin/qemu-ga", "qemu-guest-agent"},
	{"hwclock", "sbin/hwclock", "util-linux-extra"}, // for the agent's guest-set-time
}

// guestFiles collects everything that is not of the kernel, sorted by name.
func guestFiles(ctx context.Context, cacheDir string) ([]guestFile, error) {
	probe, err := buildProbe(ctx, cacheDir)
	if err != nil {
		return nil, err
	}
	files := []guestFile{
		{"etc/rc", 0o755, initScript},
		{"etc/inittab", 0o644, inittab},
		{"etc/acpi/PWRF/00000080", 0o755, []byte("#!/bin/sh\nexec /sbin/shutdown -P\n")},
		{"sbin/shutdown", 0o755, shutdownScript},
		{"sbin/probe", 0o755, probe},
	}
	libs := map[string]bool{}
	for _, p := range hostPrograms {
		file, err := findProgram(p.program)
		if err != nil {
			return nil, fmt.Errorf("%w (Debian package %s)", err, p.debian)
		}
		body, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		files = append(files, guestFile{p.inGuest, 0o755, body})
		need, err := libraries(ctx, file)
		if err != nil {
			return nil, err
		}
		if p.program == "busybox" && len(need) > 0 {
			return nil, errors.New("busybox is not static: install busybox-static")
		}
		for _, lib := range need {
			libs[lib] = true
		}
	}
	for lib := range libs {
		body, err := os.ReadFile(lib)
		if err != nil {
			return nil, err
		}
		files = append(files, guestFile{strings.TrimPrefix(lib, "/"), 0o755, body})
	}
	slices.SortFunc(files, func(a, b guestFile) int { return strings.Compare(a.name, b.name) })
	return files, nil
}

// findProgram looks in $PATH and where administrators' programs are.
func findProgram(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return filepath.Abs(p)
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("no program %s", name)
}

// libraries lists the shared objects that ldd names; none for a static program.
func libraries(ctx context.Context, file string) ([]string, error) {
	out, err := exec.CommandContext(ctx, "ldd", file).CombinedOutput()
	if strings.Contains(string(out), "not a dynamic executable") {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("ldd %s: %w: %s", file, err, out)
	}
	var libs []string
	for word := range strings.FieldsSeq(string(out)) {
		if strings.HasPrefix(word, "/") {
			libs = append(libs, word)
		}
	}
	return libs, nil
}

// buildProbe compiles the program that runs in the guest.
func buildProbe(ctx context.Context, cacheDir string) ([]byte, error) {
	out := filepath.Join(cacheDir, "probe")
	// No VCS stamp: it would make a new image of each commit.
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", out, "belay/vmtests/probe/cmd")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOAMD64=v1")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build probe: %w: %s", err, msg)
	}
	return os.ReadFile(out)
}

// key names an image by what goes into it.
func key(deb string, files []guestFile) string {
	h := sha256.New()
	fmt.Fprintln(h, imageFormat, filepath.Base(deb), wantModules)
	for _, f := range files {
		fmt.Fprintf(h, "%s %o %x\n", f.name, f.perm, sha256.Sum256(f.body))
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

// initramfs packs the archive. It is not compressed: what gzip or zstd save in
// loading, an emulated CPU spends on unpacking.
func initramfs(k *kernelImage, files []guestFile) []byte {
	var a archive
	made := map[string]bool{".": true}
	var mkdir func(string)
	mkdir = func(dir string) {
		if !made[dir] {
			mkdir(path.Dir(dir))
			made[dir] = true
			a.dir(dir)
		}
	}
	add := func(f guestFile) {
		mkdir(path.Dir(f.name))
		a.file(f.name, f.perm, f.body)
	}
	for _, dir := range []string{"proc", "sys", "dev", "run", "tmp", "var"} {
		mkdir(dir)
	}
	a.char("dev/console", 0o600, 5, 1) // the kernel opens it before init mounts /dev
	a.link("var/run", "/run")
	for _, f := range files {
		add(f)
	}
	var list strings.Builder
	for _, m := range k.modules {
		add(guestFile{"modules/" + m.file, 0o644, m.body})
		fmt.Fprintln(&list, m.file)
	}
	add(guestFile{"modules.list", 0o644, []byte(list.String())})
	for _, applet := range strings.Fields("sh mount insmod cat hostname ip mkdir ln sync poweroff reboot halt acpid dmesg ls ps top free") {
		a.link("bin/"+applet, "busybox")
	}
	a.link("sbin/reboot", "/bin/busybox")
	a.link("init", "/bin/busybox") // busybox init, by its name
	return a.finish()
}
