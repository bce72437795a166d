package machine

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
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"belay/vmtests/imagecache"
)

//go:embed image.sh
var imageScript []byte

// Image is what hosts boot from.
type Image struct {
	Dir string // in the cache
	// Kernels are the releases ("6.1.0-56-cloud-amd64") of the two kernels in the image. The
	// first is what hosts boot; the second is there to change to. In a host their files are
	// /boot/vmlinuz-RELEASE and /boot/initrd.img-RELEASE, as Debian has them.
	Kernels []string
}

// Kernel and Initrd are a kernel's files on this machine.
func (i Image) Kernel(release string) string { return filepath.Join(i.Dir, "vmlinuz-"+release) }

// Initrd is the kernel's initramfs; see Kernel.
func (i Image) Initrd(release string) string { return filepath.Join(i.Dir, "initrd.img-"+release) }

// Root is the root file system, without belayd: a raw ext4.
func (i Image) Root() string { return filepath.Join(i.Dir, "root.img") }

// key is the private key by which root is let in.
func (i Image) key() string { return filepath.Join(i.Dir, "id") }

// Build returns the image for the present image.sh, making it in cacheDir if it is not
// there, which takes a minute or two and needs root, mmdebstrap, mke2fs and apt's mirror.
// Builders in other processes are waited for.
func Build(ctx context.Context, cacheDir string, log *slog.Logger) (Image, error) {
	img, err := build(ctx, cacheDir, log)
	if err != nil {
		return Image{}, fmt.Errorf("build the hosts' image: %w", err)
	}
	return img, nil
}

func build(ctx context.Context, cacheDir string, log *slog.Logger) (img Image, err error) {
	sum := sha256.Sum256(imageScript)
	img.Dir = filepath.Join(cacheDir, "machine-"+hex.EncodeToString(sum[:8]))
	if err := os.MkdirAll(cacheDir, 0o755); err != nil {
		return img, err
	}
	unlock, err := imagecache.Lock(ctx, filepath.Join(cacheDir, "machine.lock"))
	if err != nil {
		return img, err
	}
	defer unlock()
	now := time.Now()
	if err := os.Chtimes(img.Dir, now, now); errors.Is(err, os.ErrNotExist) {
		if err := makeImage(ctx, cacheDir, img.Dir); err != nil {
			return img, err
		}
		log.Info("hosts' image built", "path", img.Dir, "took", time.Since(now))
		imagecache.Prune(cacheDir, "machine-*", log)
	} else if err != nil {
		return img, err
	}
	b, err := os.ReadFile(filepath.Join(img.Dir, "kernels"))
	if err != nil {
		return img, err
	}
	img.Kernels = strings.Fields(string(b))
	return img, nil
}

func makeImage(ctx context.Context, cacheDir, final string) error {
	tmp, err := os.MkdirTemp(cacheDir, "new-machine-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp) // no longer there when all went well
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "sh", "-s", tmp)
	cmd.Stdin = strings.NewReader(string(imageScript))
	// Stopped by SIGTERM it unmounts what it has mounted.
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("image.sh: %w: %s", err, out)
	}
	return os.Rename(tmp, final)
}
