// Command bench runs the benchmarks of docs/benchmarks.md on the lab: each
// figure beside the plain alternative, measured in the same run.
package main

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"belay/vmtests/cluster"
	"belay/vmtests/crowd"
	"belay/vmtests/lab"
)

// part is one benchmark.
type part struct {
	name   string
	rounds int // unless -rounds says otherwise: what its figures are made of
	run    func(ctx context.Context, bin cluster.Binaries, rounds int) error
}

func parts() []part {
	return []part{
		{name: "daemon", rounds: 101, run: benchDaemon},
		{name: "migrate", rounds: 12, run: benchMigrate}, // an even number has both go each way equally often
		{name: "drain", rounds: 8, run: benchDrain},
		{name: "hold", rounds: 7, run: benchHold},
		{name: "clock", rounds: 50, run: benchClock},
		{name: "vmm", rounds: 7, run: benchVMM},
		{name: "events", rounds: 10, run: benchEvents}, // 2,000 events each way, 30 s of polls
	}
}

func main() {
	crowd.Main()
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	var names []string
	for _, p := range parts() {
		names = append(names, p.name)
	}
	flags := flag.NewFlagSet("bench", flag.ExitOnError)
	only := flags.String("only", "", "run only this part: "+strings.Join(names, ", "))
	rounds := flags.Int("rounds", 0, "how often each tool is measured; 0 is each part's own number")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *only != "" && !slices.Contains(names, *only) {
		return fmt.Errorf("there is no part %q", *only)
	}
	bin, discard, err := cluster.Programs(ctx)
	if err != nil {
		return err
	}
	defer discard()
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return err
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return err
	}
	fmt.Printf("%s, %d cores, load %s, Linux %s, %s\n", time.Now().UTC().Format(time.DateOnly), runtime.NumCPU(), strings.Fields(string(load))[0], unix.ByteSliceToString(uts.Release[:]), runtime.Version())
	for _, p := range parts() {
		if *only == "" || *only == p.name {
			if err := p.run(ctx, bin, cmp.Or(*rounds, p.rounds)); err != nil {
				return fmt.Errorf("%s: %w", p.name, err)
			}
		}
	}
	return nil
}

// down takes a lab down, also when the run was interrupted.
func down(l *lab.Lab) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := l.Down(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
	}
}

func heading(format string, args ...any) { fmt.Printf("\n"+format+"\n", args...) }

func line(name, format string, args ...any) {
	fmt.Printf("  %-28s %s\n", name, fmt.Sprintf(format, args...))
}

func verdict(what string, reached bool) {
	word := "reached"
	if !reached {
		word = "NOT reached"
	}
	fmt.Printf("  target: %s: %s\n", what, word)
}

func ms(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond)) }

func ratio(a, b time.Duration) float64 {
	if b == 0 {
		return 0
	}
	return float64(a) / float64(b)
}
