// Command probe runs inside a lab guest; see package probe.
package main

import (
	"context"
	"log/slog"
	"os"
	"runtime"

	"belay/vmtests/probe"
)

func main() {
	// With one CPU the sender's thread would queue for the only P behind the
	// dirtier; with spare ones the kernel's priorities decide.
	runtime.GOMAXPROCS(max(4, runtime.NumCPU()))
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if err := probe.Main(context.Background(), log); err != nil {
		log.Error("probe failed", "err", err)
		os.Exit(1)
	}
}
