package probe

import (
	"fmt"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// clock reads a POSIX clock in ns. Go's own monotonic clock has no absolute
// value, and a ruler must say which clock it read.
func clock(id int32) int64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(id, &ts); err != nil {
		// Only an unknown clock or a bad pointer can fail.
		panic(fmt.Sprintf("clock_gettime(%d): %v", id, err))
	}
	return ts.Nano()
}

func monotonic() time.Duration { return time.Duration(clock(unix.CLOCK_MONOTONIC)) }

func boottime() time.Duration { return time.Duration(clock(unix.CLOCK_BOOTTIME)) }

func wall() int64 { return clock(unix.CLOCK_REALTIME) }

// sleepUntil blocks the calling thread until CLOCK_MONOTONIC reads t. It is
// clock_nanosleep(2) on the absolute time and not a Go timer, because the
// latter is at the mercy of whichever thread polls for it.
//
// The call is raw: the scheduler does not know that the thread sleeps, and so
// neither takes its processor away nor hands it another one afterwards. At a
// thousand calls a second that hand-over, and the monitor thread which it keeps
// awake, is all that an emulated CPU can do. The price is a stop of the world
// that waits for the end of the sleep.
func sleepUntil(t time.Duration) {
	ts := unix.NsecToTimespec(int64(t))
	for {
		_, _, errno := unix.RawSyscall6(unix.SYS_CLOCK_NANOSLEEP, unix.CLOCK_MONOTONIC, unix.TIMER_ABSTIME,
			uintptr(unsafe.Pointer(&ts)), 0, 0, 0)
		if errno != unix.EINTR {
			return
		}
	}
}
