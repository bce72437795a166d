// Command belayd is the agent on each host. See ARCHITECTURE.md for the way
// through it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent"
	"belay/agent/api"
	"belay/agent/config"
	"belay/agent/journal"
	"belay/agent/page"
	"belay/hypervisor"
	"belay/patch/hoststep"
)

// version is set by the build (-X main.version).
var version = "devel"

func main() {
	if len(os.Args) > 1 && os.Args[1] == hoststep.SuperviseArg {
		os.Exit(hoststep.Supervise(os.Args[2:]))
	}
	if len(os.Args) > 1 && os.Args[1] == agent.TwinArg {
		os.Exit(serveTwin())
	}
	// Neither a log that nobody reads any more nor a terminal that is closed
	// is a reason to leave guests on their way alone.
	signal.Ignore(unix.SIGPIPE, unix.SIGHUP)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	code := serve(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// serveTwin is belayd as the supervisor of the host's second libvirt.
func serveTwin() int {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	if err := agent.ServeTwin(ctx, newLog(os.Stderr, false)); err != nil {
		fmt.Fprintf(os.Stderr, "belayd: %v\n", err)
		return 1
	}
	return 0
}

// The exit codes beside 0, a clean stop.
const (
	exitFailed = 1  // it cannot serve
	exitUsage  = 2  // flags, configuration or certificates are wrong
	exitAgain  = 75 // it is to be started anew, see errAgain
)

// errAgain is that of a belayd that was told to give way to another (SIGUSR1).
var errAgain = errors.New("to be started anew")

// serve is belayd from flags to exit code.
func serve(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("belayd", flag.ContinueOnError)
	flags.SetOutput(stderr)
	file := flags.String("config", config.DefaultFile, "configuration `file`; drop-ins are read from the folder beside it that ends in .d")
	check := flags.Bool("check", false, "check the configuration and exit")
	restore := flags.Bool("restore", false, "restore the guests that the reserved memory holds after a change of kernel, and exit: for when belayd cannot start")
	debugLog := flags.Bool("debug", false, "log what is of interest to developers")
	showVersion := flags.Bool("version", false, "print the version and exit")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return exitUsage
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(stderr, "belayd: unexpected argument %q (belayd takes flags only, see belayd -help)\n", flags.Arg(0))
		return exitUsage
	}
	if *showVersion {
		fmt.Fprintln(stdout, "belayd", version)
		return 0
	}
	log := newLog(stderr, *debugLog)
	cfg, err := config.Load(*file)
	if *restore {
		return rescue(ctx, cfg, err, log, stderr)
	}
	if err != nil {
		fmt.Fprintf(stderr, "belayd: %v\n", err)
		return exitUsage
	}
	if err := agent.CheckWindows(cfg); err != nil {
		fmt.Fprintf(stderr, "belayd: %v\n", err)
		return exitUsage
	}
	// Certificates that cannot be read are settings that are wrong: a restart
	// does not mend them.
	id, err := api.LoadIdentity(cfg.TLS.CA, cfg.TLS.Cert, cfg.TLS.Key)
	if err != nil {
		fmt.Fprintf(stderr, "belayd: %v\n", err)
		return exitUsage
	}
	if *check {
		if _, err := os.Stat(*file); err != nil {
			fmt.Fprintf(stdout, "%s: does not exist, the defaults are used\n", *file)
		}
		fmt.Fprintf(stdout, "%s: ok, host %s, peers: %d\n", *file, cfg.Host, len(cfg.Peers))
		return 0
	}
	switch err := run(ctx, cfg, id, log); {
	case errors.Is(err, errAgain):
		return exitAgain
	case err != nil:
		fmt.Fprintf(stderr, "belayd: %v\n", err)
		return exitFailed
	}
	return 0
}

// rescue is belayd -restore. It needs neither the journal nor another belayd's leave: who
// restores a guest has the lock of the memory that it is in. A configuration that is wrong, by
// bad, may be why belayd does not start: as far as it can be read, it counts.
func rescue(ctx context.Context, cfg config.Config, bad error, log *slog.Logger, stderr io.Writer) int {
	if bad != nil {
		log.Warn("the configuration is wrong, so that defaults are used for what it does not say", "err", bad)
	}
	hyp := hypervisor.New(hypervisor.Config{Socket: cfg.Libvirt.Socket, URI: cfg.Libvirt.URI, Log: log})
	defer hyp.Close()
	if err := agent.Rescue(ctx, cfg, hyp, log); err != nil {
		fmt.Fprintf(stderr, "belayd: %v\n", err)
		return exitFailed
	}
	return 0
}

// run wires one host's agent together and lets it live until ctx ends, or until no guest
// is held after a SIGUSR1.
func run(ctx context.Context, cfg config.Config, id api.Identity, log *slog.Logger) error {
	again := make(chan os.Signal, 1)
	signal.Notify(again, unix.SIGUSR1)
	defer signal.Stop(again)
	j, err := journal.Open(cfg.StateDir)
	if err != nil {
		return err
	}
	defer j.Close()
	hyp := hypervisor.New(hypervisor.Config{Socket: cfg.Libvirt.Socket, URI: cfg.Libvirt.URI, Log: log})
	defer hyp.Close()
	a := agent.New(cfg, version, hyp, j, agent.NewPreserve(cfg, hyp, log), id.Client, log)
	servers := api.NewServers(log)
	defer stopServing(servers)
	if err := listen(cfg, servers, a, id, log); err != nil {
		return err
	}

	// The servers stop before the agent does, so nobody is admitted to an
	// agent that is going down; what the agent leaves open is in its journal.
	life, end := context.WithCancel(context.Background())
	defer end()
	failed := make(chan error, 8)
	var parts sync.WaitGroup
	parts.Go(func() { failed <- hyp.Run(life) })
	parts.Go(func() { failed <- a.Run(life) })
	parts.Go(func() { failed <- a.ServeGuests(life) })
	parts.Go(func() { notifySystemd(life, a, log) })
	parts.Go(func() { giveWay(life, again, a, failed, log) })
	servers.Serve(failed)
	log.Info("belayd serves", "version", version, "host", cfg.Host, "socket", cfg.API.Socket, "listen", cfg.API.Listen, "peers", len(cfg.Peers))

	select {
	case <-ctx.Done():
		log.Info("shutting down")
	case err = <-failed:
	}
	stopServing(servers)
	end()
	parts.Wait()
	return err
}

// giveWay ends this belayd, for another to be started, when it is told to and no guest is
// held.
func giveWay(life context.Context, again <-chan os.Signal, a *agent.Agent, failed chan<- error, log *slog.Logger) {
	select {
	case <-again:
	case <-life.Done():
		return
	}
	log.Info("to be started anew, when no guest is held")
	if a.Calm(life) == nil {
		failed <- errAgain
	}
}

// listen opens everything that belayd serves on.
func listen(cfg config.Config, s *api.Servers, a *agent.Agent, id api.Identity, log *slog.Logger) error {
	who := api.Access{Operators: cfg.Access.Operators, Viewers: cfg.Access.Viewers,
		OperatorCerts: cfg.Access.OperatorCerts, ViewerCerts: cfg.Access.ViewerCerts}
	for _, p := range cfg.Peers {
		who.PeerCerts = append(who.PeerCerts, p.CertName)
	}
	if err := s.ListenUnix(cfg.API.Socket, a, who); err != nil {
		return err
	}
	if cfg.API.Listen != "" {
		if err := s.ListenTLS(cfg.API.Listen, id, a, who); err != nil {
			return err
		}
	}
	if cfg.API.Metrics != "" {
		if err := s.ListenMetrics(cfg.API.Metrics, a.Metrics()); err != nil {
			return err
		}
	}
	if cfg.Page.Listen != "" {
		return s.ListenPage(cfg.Page.Listen, page.Handler(a, log))
	}
	return nil
}

func stopServing(s *api.Servers) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	s.Close(ctx)
}

// newLog logs as text, without the time where journald adds its own.
func newLog(w io.Writer, debug bool) *slog.Logger {
	o := &slog.HandlerOptions{Level: slog.LevelInfo}
	if debug {
		o.Level = slog.LevelDebug
	}
	if os.Getenv("JOURNAL_STREAM") != "" {
		o.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		}
	}
	return slog.New(slog.NewTextHandler(w, o))
}
