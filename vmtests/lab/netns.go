package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// netnsDir is where ip-netns(8) keeps named network namespaces.
const netnsDir = "/run/netns"

func (l *Lab) netns(part string) string { return "belay-" + l.Name + "-" + part }

func netnsPath(name string) string { return filepath.Join(netnsDir, name) }

// InNet runs f on an operating-system thread that is inside the host's network
// namespace. Sockets made by f itself belong to the host for as long as they
// are open, whoever uses them later; goroutines that f starts do not run there.
func (h *Host) InNet(f func() error) error { return inNetns(h.netns, f) }

// InSwitch is [Host.InNet] for the switch's namespace, where an observer has
// the address 10.77.255.254 on the guests' LAN.
func (l *Lab) InSwitch(f func() error) error { return inNetns(l.netns("switch"), f) }

func inNetns(name string, f func() error) error {
	there, err := os.Open(netnsPath(name))
	if err != nil {
		return fmt.Errorf("cannot enter network namespace %s: %w", name, err)
	}
	defer there.Close()

	done := make(chan error, 1)
	go func() {
		// Sent in a defer, so that a caller is not left waiting when f
		// ends the goroutine (t.FailNow does).
		err := errors.New("the function ended its goroutine")
		defer func() { done <- err }()

		runtime.LockOSThread()
		back, openErr := os.Open("/proc/thread-self/ns/net")
		if openErr != nil {
			runtime.UnlockOSThread()
			err = openErr
			return
		}
		defer back.Close()
		if setErr := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); setErr != nil {
			runtime.UnlockOSThread()
			err = fmt.Errorf("cannot enter network namespace %s: %w", name, setErr)
			return
		}
		defer func() {
			// A thread that cannot go back stays locked: the runtime
			// ends it with this goroutine, and nobody else runs in the
			// wrong network.
			if unix.Setns(int(back.Fd()), unix.CLONE_NEWNET) == nil {
				runtime.UnlockOSThread()
			}
		}()
		err = f()
	}()
	return <-done
}
