package guest

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"belay/vmtests/program"
)

// Debian's kernel without drivers for hardware: a small one that boots fast.
const kernelMeta = "linux-image-cloud-amd64"

// wantModules are what the guest needs; what they depend on is added.
var wantModules = [...]string{
	"virtio_pci", "virtio_console", "virtio_net", "virtio_blk",
	"button", "evdev", // ACPI power button
}

// kernelImage is what the builder takes from a kernel package.
type kernelImage struct {
	pkg     string // file name of the package, which holds its version
	vmlinuz []byte
	modules []module // in the order in which they can be loaded
}

type module struct {
	file string // as in the package: name.ko
	body []byte
}

var kernelPackage = regexp.MustCompile(`^linux-image-[0-9].*-cloud-amd64$`)

// fetchKernel returns the path of the newest kernel package in dir, after
// downloading one if there is none.
func fetchKernel(ctx context.Context, dir string, log *slog.Logger) (string, error) {
	if path, err := newestKernel(ctx, dir); path != "" || err != nil {
		return path, err
	}
	out, err := program.Output(ctx, dir, "apt-cache", "depends", kernelMeta)
	if err != nil {
		return "", err
	}
	i := slices.IndexFunc(strings.Fields(out), kernelPackage.MatchString)
	if i < 0 {
		return "", fmt.Errorf("apt knows no %s; run apt-get update", kernelMeta)
	}
	pkg := strings.Fields(out)[i]
	log.Info("downloading guest kernel", "package", pkg)

	// Into a folder of its own: apt-get writes in place, and a download that
	// was cut off must not pass for a package.
	tmp, err := os.MkdirTemp(dir, "download-")
	if err != nil {
		return "", fmt.Errorf("download %s: %w", pkg, err)
	}
	defer os.RemoveAll(tmp)
	if _, err := program.Output(ctx, tmp, "apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", pkg); err != nil {
		return "", err
	}
	path, err := newestKernel(ctx, tmp)
	if err == nil && path == "" {
		err = fmt.Errorf("apt-get download %s left no package", pkg)
	}
	if err != nil {
		return "", err
	}
	final := filepath.Join(dir, filepath.Base(path))
	if err := os.Rename(path, final); err != nil {
		return "", fmt.Errorf("keep %s: %w", pkg, err)
	}
	return final, nil
}

// newestKernel is the kernel package in dir with the highest version, or "".
func newestKernel(ctx context.Context, dir string) (string, error) {
	all, err := filepath.Glob(filepath.Join(dir, "linux-image-*-cloud-amd64_*.deb"))
	if err != nil {
		return "", fmt.Errorf("look for kernel packages: %w", err)
	}
	best, bestVersion := "", ""
	for _, path := range all {
		_, version, _ := strings.Cut(filepath.Base(path), "_")
		if best != "" {
			err := exec.CommandContext(ctx, "dpkg", "--compare-versions", version, "gt", bestVersion).Run()
			var exit *exec.ExitError
			if errors.As(err, &exit) {
				continue // exit status 1: it is not
			}
			if err != nil {
				return "", fmt.Errorf("compare kernel versions: %w", err)
			}
		}
		best, bestVersion = path, version
	}
	return best, nil
}

// readKernel takes kernel and modules out of a package without unpacking it.
func readKernel(ctx context.Context, deb string) (*kernelImage, error) {
	// Stopped early it would die of SIGPIPE, so it is read to its end.
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("unpack %s: %w", deb, err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("unpack %s: %w", deb, err)
	}
	k := &kernelImage{pkg: filepath.Base(deb)}
	ko, readErr := k.collect(pipe)
	if readErr != nil {
		io.Copy(io.Discard, pipe) // let it end; the error is known already
	}
	if err := errors.Join(readErr, cmd.Wait()); err != nil {
		return nil, fmt.Errorf("unpack %s: %w %s", deb, err, stderr.Bytes())
	}
	if k.vmlinuz == nil {
		return nil, fmt.Errorf("unpack %s: no kernel inside", deb)
	}
	k.modules, err = loadOrder(ko, wantModules[:])
	if err != nil {
		return nil, fmt.Errorf("unpack %s: %w", deb, err)
	}
	return k, nil
}

// collect reads the tar stream; modules are returned by name.
func (k *kernelImage) collect(r io.Reader) (map[string]module, error) {
	ko := map[string]module{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return ko, nil
		}
		if err != nil {
			return nil, err
		}
		base := filepath.Base(h.Name)
		isKernel := strings.HasPrefix(base, "vmlinuz-")
		name, isModule := strings.CutSuffix(base, ".ko")
		// Everything the guest may need is below these; the rest of the
		// package's modules is a hundred megabytes to read for nothing.
		if isModule && !strings.Contains(h.Name, "/kernel/drivers/") && !strings.Contains(h.Name, "/kernel/net/core/") {
			continue
		}
		if !isKernel && !isModule {
			continue
		}
		body, err := io.ReadAll(tr)
		if err != nil {
			return nil, err
		}
		if isKernel {
			k.vmlinuz = body
		} else {
			ko[strings.ReplaceAll(name, "-", "_")] = module{file: base, body: body}
		}
	}
}

// loadOrder returns the wanted modules after those they depend on.
func loadOrder(ko map[string]module, want []string) ([]module, error) {
	var order []module
	seen := map[string]bool{}
	var visit func(string) error
	visit = func(name string) error {
		if seen[name] {
			return nil
		}
		seen[name] = true
		m, ok := ko[name]
		if !ok {
			return fmt.Errorf("no module %s", name)
		}
		deps, err := depends(m.body)
		if err != nil {
			return fmt.Errorf("module %s: %w", name, err)
		}
		for _, d := range deps {
			if err := visit(d); err != nil {
				return fmt.Errorf("module %s: %w", name, err)
			}
		}
		order = append(order, m)
		return nil
	}
	for _, name := range want {
		if err := visit(name); err != nil {
			return nil, err
		}
	}
	return order, nil
}

// depends reads the "depends=" entry of a module's .modinfo section. The
// package has no modules.dep: depmod makes that where it is installed.
func depends(ko []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(ko))
	if err != nil {
		return nil, err
	}
	s := f.Section(".modinfo")
	if s == nil {
		return nil, errors.New("no .modinfo section")
	}
	info, err := s.Data()
	if err != nil {
		return nil, err
	}
	for entry := range strings.SplitSeq(string(info), "\x00") {
		if list, ok := strings.CutPrefix(entry, "depends="); ok && list != "" {
			return strings.Split(strings.ReplaceAll(list, "-", "_"), ","), nil
		}
	}
	return nil, nil
}
