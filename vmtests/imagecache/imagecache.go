// Package imagecache has what is common to folders in which images are kept for later.
package imagecache

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Keep is how long an image that no one asks for stays in a cache.
const Keep = 7 * 24 * time.Hour

// Lock takes an exclusive lock on a file, waiting for other processes.
func Lock(ctx context.Context, file string) (unlock func(), err error) {
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", file, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", file, ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Prune drops the folders of a cache, of those that a pattern names (path.Match), that were
// not asked for in a long time.
func Prune(dir, pattern string, log *slog.Logger) {
	images, _ := filepath.Glob(filepath.Join(dir, pattern)) // the pattern is good
	for _, image := range images {
		st, err := os.Stat(image)
		if err != nil || !st.IsDir() || time.Since(st.ModTime()) < Keep {
			continue
		}
		if err := os.RemoveAll(image); err != nil {
			log.Warn("cannot drop an old image", "path", image, "err", err)
		}
	}
}
