// Package boottime is the time that nobody can set: since the host's boot.
package boottime

import (
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Now is the time since boot, that of a suspended host included (CLOCK_BOOTTIME,
// clock_gettime(2)).
func Now() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		panic(err) // the clock is always there
	}
	return time.Duration(t.Nano())
}

// ID tells one boot from the next (/proc/sys/kernel/random/boot_id, random(4)).
func ID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("cannot tell this boot from others: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}
