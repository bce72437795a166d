// Command belay-leash releases the guests that belayd holds when belayd does not.
// belayd starts it for each hold; see package patch/leash.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"belay/agent/boottime"
	"belay/agent/maint"
	"belay/hypervisor"
	"belay/hypervisor/monitor"
	"belay/patch/leash"
)

// version is set by the build (-X main.version).
var version = "devel"

func main() {
	// Nothing but SIGTERM, and that only by way of a release. A log that
	// nobody reads any more is no reason to end.
	missing := leash.Harden()
	signal.Ignore(unix.SIGPIPE, unix.SIGHUP, unix.SIGINT)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], missing, os.Stdout, os.Stderr))
}

// run is the leash from flags to exit code: 0 when it has done what it was told,
// 1 when it cannot be a leash, 2 when flags are wrong. missing is what it lacks
// of its protections.
func run(ctx context.Context, args, missing []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("belay-leash", flag.ContinueOnError)
	flags.SetOutput(stderr)
	dir := flags.String("dir", "/run/belay/leash", "`folder` of the leashes' notes and sockets, in RAM")
	op := flags.String("op", "", "`operation` whose leash this is")
	socket := flags.String("libvirt-socket", "", "libvirt's `socket`; empty finds virtqemud's or libvirtd's")
	uri := flags.String("libvirt-uri", "qemu:///system", "libvirt's `URI`")
	libDir := flags.String("libvirt-lib", monitor.DefaultLibDir, "`folder` where libvirt keeps the guests' monitors")
	showVersion := flags.Bool("version", false, "print the version and exit")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2
	}
	switch {
	case *showVersion:
		fmt.Fprintln(stdout, "belay-leash", version)
		return 0
	case flags.NArg() > 0 || *op == "" || !filepath.IsAbs(*dir):
		fmt.Fprintln(stderr, "belay-leash: is started by belayd, with -op and an absolute -dir")
		return 2
	}
	log, flush := newLog(stderr)
	defer flush()
	keeper := leash.Config{Dir: *dir, Op: maint.OpID(*op), Clock: boottime.Now, Warnings: missing, Log: log,
		Find:    func(g leash.Guest) (string, error) { return monitor.Find(*libDir, g.ID) },
		Monitor: dialMonitor}
	// Of a daemon that listens elsewhere it is not known which process it is.
	if *socket == "" || strings.HasPrefix(*socket, "/run/libvirt/") || strings.HasPrefix(*socket, "/var/run/libvirt/") {
		keeper.KillLibvirt = func() error { return killLibvirt("/run") }
	}
	if err := serve(ctx, keeper, hypervisor.Config{Socket: *socket, URI: *uri, Log: log}); err != nil {
		log.Error("the leash ends", "op", *op, "err", err)
		return 1
	}
	return 0
}

// serve claims the operation and keeps its order.
func serve(ctx context.Context, c leash.Config, libvirt hypervisor.Config) error {
	l, closeListener, err := leash.Listen(c.Dir, c.Op)
	if err != nil {
		return err
	}
	defer closeListener()
	if c.Boot, err = boottime.ID(); err != nil {
		return err
	}
	host := hypervisor.New(libvirt)
	defer host.Close()
	c.Host = host
	k, err := leash.NewKeeper(c)
	if err != nil {
		return err
	}
	return k.Run(ctx, l)
}

// dialMonitor is monitor.Dial in the leash's terms.
func dialMonitor(ctx context.Context, path string) (leash.Monitor, error) {
	m, err := monitor.Dial(ctx, path)
	switch {
	case errors.Is(err, monitor.ErrTaken):
		return nil, fmt.Errorf("%w: %w", leash.ErrTaken, err)
	case err != nil:
		return nil, err
	}
	return m, nil
}
