// Command belay-guest runs in guests whose packets their host does not see. It
// listens where metadata is asked for in every public cloud, 169.254.169.254 on
// the guest's own loopback, and forwards connections to the host's belayd over
// vsock or a virtio-serial port. Programs in the guest need not know.
//
// It needs no systemd, no udev and no files, and runs in an initramfs.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"

	"belay/notify/channel/wire"
)

// version is set by the build (-X main.version).
var version = "devel"

// Exit codes.
const (
	exitOK      = 0
	exitFailed  = 1
	exitUsage   = 2
	exitNoWay   = 3 // neither vsock nor the port is there
	exitServed  = 4 // something else serves the address
	usageHeader = `Usage: belay-guest [flags]

Lets programs in this guest ask 169.254.169.254 for scheduled events, and forwards
what they ask to the host by vsock or a virtio-serial port. It is not needed where
the host serves that address on the guest's network.

Exit codes: 0 stopped, or printed; 1 failed; 2 wrong flags; 3 the guest has no way to
the host; 4 something else serves the address.

`
)

// settings are the flags.
type settings struct {
	via    string
	port   uint
	device string
	listen netip.AddrPort
	force  bool
}

func main() {
	signal.Ignore(unix.SIGPIPE, unix.SIGHUP)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run is belay-guest from flags to exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("belay-guest", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		fmt.Fprint(stderr, usageHeader)
		flags.PrintDefaults()
	}
	var s settings
	flags.StringVar(&s.via, "via", "auto", "`way` to the host: vsock, serial, or auto, which is serial if its port is there, else vsock")
	flags.UintVar(&s.port, "port", wire.VsockPort, "vsock `port` of the host")
	flags.StringVar(&s.device, "device", "", "virtio-serial `device`; empty finds the port "+wire.Name)
	flags.TextVar(&s.listen, "listen", netip.MustParseAddrPort("169.254.169.254:80"), "IPv4 `address`:port to listen on; it is added to lo while belay-guest runs")
	flags.BoolVar(&s.force, "force", false, "listen even if the address is routed, or belongs to another interface")
	show := flags.Bool("print", false, "print this guest's scheduled events, asked from -listen, and exit")
	showVersion := flags.Bool("version", false, "print the version and exit")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return exitOK
		}
		return exitUsage
	}
	usage := func(format string, args ...any) int {
		fmt.Fprintf(stderr, "belay-guest: "+format+" (see belay-guest -help)\n", args...)
		return exitUsage
	}
	switch {
	case *showVersion:
		fmt.Fprintln(stdout, "belay-guest", version)
		return exitOK
	case flags.NArg() > 0:
		return usage("unexpected argument %q", flags.Arg(0))
	case s.via != "auto" && s.via != "vsock" && s.via != "serial":
		return usage("-via %s: there is no such way; it can be auto, vsock or serial", s.via)
	case s.port == 0 || s.port >= unix.VMADDR_PORT_ANY:
		return usage("-port %d: is no vsock port; it can be 1 to %d", s.port, uint32(unix.VMADDR_PORT_ANY-1))
	case !s.listen.Addr().Is4():
		return usage("-listen %s: is not an IPv4 address", s.listen)
	}
	task := func() error { return serve(ctx, s, newLog(stderr)) }
	if *show {
		task = func() error { return printEvents(ctx, s.listen, stdout) }
	}
	switch err := task(); {
	case err == nil:
		return exitOK
	case errors.Is(err, errNoWay):
		fmt.Fprintf(stderr, "belay-guest: %v\n", err)
		return exitNoWay
	case errors.Is(err, errServed):
		fmt.Fprintf(stderr, "belay-guest: %v\n", err)
		return exitServed
	default:
		fmt.Fprintf(stderr, "belay-guest: %v\n", err)
		return exitFailed
	}
}

// serve forwards until ctx ends.
func serve(ctx context.Context, s settings, log *slog.Logger) error {
	way, err := find(s)
	if err != nil {
		return err
	}
	remove, err := addAddress(s.listen.Addr(), s.force)
	if err != nil {
		return err
	}
	defer func() {
		if err := remove(); err != nil {
			log.Warn("the address stays on lo", "err", err)
		}
	}()
	l, err := net.Listen("tcp4", s.listen.String())
	if errors.Is(err, unix.EADDRINUSE) {
		return fmt.Errorf("%w: another program listens on %s (stop it, or do without belay-guest)", errServed, s.listen)
	} else if err != nil {
		return fmt.Errorf("cannot listen on %s: %w", s.listen, err)
	}
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		log.Warn("cannot notify systemd", "err", err)
	}
	log.Info("belay-guest serves", "version", version, "listen", s.listen, "via", way)
	return forward(ctx, l, way, log)
}

// newLog logs as text, without the time where journald adds its own.
func newLog(w io.Writer) *slog.Logger {
	o := &slog.HandlerOptions{ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && a.Key == slog.TimeKey && os.Getenv("JOURNAL_STREAM") != "" {
			return slog.Attr{}
		}
		return a
	}}
	return slog.New(slog.NewTextHandler(w, o))
}
