package guest

import (
	"context"
	"log/slog"

	"belay/vmtests/qemu"
)

// Prepare builds or finds the image in cacheDir, chooses the accelerator and,
// for TCG, a QEMU that migrates emulated guests whole. The reason is
// DetectAccel's.
func Prepare(ctx context.Context, cacheDir string, log *slog.Logger) (img Image, accel Accel, reason string, err error) {
	if img, err = Build(ctx, cacheDir, log); err != nil {
		return
	}
	if accel, reason, err = DetectAccel(ctx, img, log); err != nil || accel != TCG {
		return
	}
	img.QEMU, err = qemu.ForTCG(ctx, cacheDir, log)
	return
}
