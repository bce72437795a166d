package guest

import (
	"context"
	"log/slog"
	"os"
	"testing"
	"time"
)

// prepareTimeout is enough to fetch a kernel and to try KVM.
const prepareTimeout = 3 * time.Minute

// ForTest returns the image and the accelerator for a test's guests. The image
// is in DefaultCache from the second time on. A test that cannot have them
// fails; with BELAY_LAB=skip in the environment it is skipped instead.
func ForTest(t testing.TB) (Image, Accel) {
	t.Helper()
	if os.Getenv("BELAY_LAB") == "skip" {
		t.Skip("BELAY_LAB=skip: tests that need a guest are left out")
	}
	ctx, cancel := context.WithTimeout(t.Context(), prepareTimeout)
	defer cancel()
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	img, accel, reason, err := Prepare(ctx, DefaultCache(), log)
	if err != nil {
		t.Fatalf("%v\n(BELAY_LAB=skip leaves out the tests that need a guest)", err)
	}
	t.Logf("accelerator %s: %s", accel, reason)
	return img, accel
}
