package leash

import (
	"fmt"
	"os"
	"strings"
	"time"

	"belay/patch/internal/linux"
)

// Boottime is the time since boot, that of a suspended host included
// (CLOCK_BOOTTIME). Nobody can set it.
func Boottime() time.Duration { return linux.Boottime() }

// BootID tells one boot from the next.
func BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("cannot tell this boot from others: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}
