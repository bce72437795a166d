package imagecache

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"time"
)

func TestLockWaits(t *testing.T) {
	file := filepath.Join(t.TempDir(), "lock")
	unlock, err := Lock(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := Lock(ctx, file); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("locked twice: %v", err)
	}
	unlock()
	again, err := Lock(t.Context(), file)
	if err != nil {
		t.Fatal(err)
	}
	again()
}
