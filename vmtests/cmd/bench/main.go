// Command bench runs the benchmarks of docs/benchmarks.md on the lab: each
// figure beside the plain alternative, measured in the same run.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"belay/vmtests/cluster"
	"belay/vmtests/lab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("bench", flag.ExitOnError)
	only := flags.String("only", "", "run only this part: daemon or migrate")
	rounds := flags.Int("rounds", 12, "moves by each tool, in the migration benchmarks; an even number has both go each way equally often")
	if err := flags.Parse(args); err != nil {
		return err
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
	fmt.Printf("%s, %d cores, Linux %s, %s\n", time.Now().UTC().Format(time.DateOnly), runtime.NumCPU(), unix.ByteSliceToString(uts.Release[:]), runtime.Version())
	if *only == "" || *only == "daemon" {
		if err := benchDaemon(ctx, bin); err != nil {
			return err
		}
	}
	if *only == "" || *only == "migrate" {
		return benchMigrate(ctx, bin, *rounds)
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
