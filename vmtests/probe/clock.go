package probe

import (
	"fmt"
	"log/slog"
	"runtime"
	"sync"
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

// Clock notes each time that somebody sets the guest's wall clock: the ruler for
// those who put clocks right. It waits on a timer that the kernel cancels when
// the clock is set (timerfd_create(2), TFD_TIMER_CANCEL_ON_SET), so a step is
// noted by the guest's own monotonic clock within a scheduling of its happening.
type Clock struct {
	mu    sync.Mutex
	steps []ClockStep
}

// maxSteps bounds what is kept; the oldest are forgotten.
const maxSteps = 1000

// Read reads both clocks, one right after the other, and tells the steps.
func (c *Clock) Read() ClockReading {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := ClockReading{Steps: append([]ClockStep(nil), c.steps...)}
	r.Monotonic, r.Wall = monotonic(), wall()
	return r
}

// Watch notes steps for ever. What fails is logged, and ends it.
func (c *Clock) Watch(log *slog.Logger) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := realtime(); err != nil {
		log.Warn("clock steps are noted at normal priority", "err", err)
	}
	fd, err := unix.TimerfdCreate(unix.CLOCK_REALTIME, unix.TFD_CLOEXEC)
	if err != nil {
		log.Error("cannot watch the clock", "err", err)
		return
	}
	defer unix.Close(fd)
	never := unix.ItimerSpec{Value: unix.Timespec{Sec: 1 << 33}} // in the year 2242
	before := wall() - int64(monotonic())
	for b := make([]byte, 8); ; {
		if err := unix.TimerfdSettime(fd, unix.TFD_TIMER_ABSTIME|unix.TFD_TIMER_CANCEL_ON_SET, &never, nil); err != nil {
			log.Error("cannot watch the clock", "err", err)
			return
		}
		// A step between the last look and the arming is seen at the next one.
		_, err := unix.Read(fd, b)
		if err == unix.EINTR {
			continue
		}
		if err != unix.ECANCELED {
			log.Error("the clock's timer ended", "err", err)
			return
		}
		at := monotonic()
		now := wall() - int64(monotonic())
		c.mu.Lock()
		c.steps = append(c.steps, ClockStep{Monotonic: at, By: time.Duration(now - before)})
		c.steps = c.steps[max(0, len(c.steps)-maxSteps):]
		c.mu.Unlock()
		before = now
	}
}
