// Command demo shows the ladder at work: it makes two virtualisation hosts out of
// namespaces, with three guests, and has one host updated four times by belay plan and
// belay apply, each time by another rung: a component restarts under the guests (A), they
// are held (B1), get a new QEMU (B2), and move away, one when its owner has approved from
// inside it (C, D), and back. The same is then done by a plain script, and what guests felt
// of both is measured. make demo runs it.
//
// It needs root, takes a few minutes, and removes all it has made, whether it
// succeeds, fails or is interrupted. What downloads it needs stay in
// /var/cache/belay.
//
// Exit codes: 0 done, 1 failed, 130 interrupted.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"
)

const (
	exitFailed      = 1
	exitInterrupted = 130
)

// errInterrupted is the cause of a context that a signal has ended.
var errInterrupted = errors.New("interrupted")

// endings are the signals that end a demo in order. SIGPIPE is among them since
// a reader of the output that goes away, as head(1) does, must not leave hosts
// and guests behind.
func endings() []os.Signal {
	return []os.Signal{os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE}
}

func main() { os.Exit(run(os.Stdout, os.Stderr)) }

func run(stdout, stderr io.Writer) int {
	if os.Geteuid() != 0 {
		fmt.Fprintln(stderr, "demo: needs root, for namespaces, bridges and libvirtd: run it as root (sudo make demo)")
		return exitFailed
	}
	ctx, interrupt := context.WithCancelCause(context.Background())
	defer interrupt(nil)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, endings()...)
	go func() {
		<-signals
		// Ignored signals are so in the programs that clean up, too: a
		// terminal sends Ctrl-C to them all.
		signal.Ignore(endings()...)
		fmt.Fprintln(stderr, "\ndemo: interrupted; cleaning up, which takes a few seconds (Ctrl-C no longer has an effect)")
		interrupt(errInterrupted)
	}()

	d := &demo{out: stdout, begin: time.Now()}
	err := d.run(ctx)
	if d.leaves() {
		fmt.Fprintf(stderr, "demo: something is left behind, which the next demo, or make clean, removes: %v\n", err)
		return exitFailed
	}
	switch {
	case errors.Is(context.Cause(ctx), errInterrupted):
		fmt.Fprintln(stderr, "demo: interrupted; nothing is left of it")
		return exitInterrupted
	case err != nil:
		fmt.Fprintf(stderr, "demo: %v\n", err)
		return exitFailed
	}
	return 0
}
