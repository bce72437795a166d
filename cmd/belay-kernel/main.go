// Command belay-kernel changes the running kernel for belayd, which has not the
// capabilities to: it loads, disables and unloads livepatches that are signed by a key in
// its own folder, likewise patches guests' QEMUs, loads microcode late, and tells what only the
// privileged can see. Systemd starts it for each connection to its socket (Accept=yes), of which belayd
// keeps one; it ends when belayd hangs up.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/user"
	"strconv"

	"github.com/coreos/go-systemd/v22/activation"

	"belay/patch/kexec"
	"belay/patch/live"
	"belay/patch/live/remote"
)

// version is set by the build (-X main.version).
var version = "devel"

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

// run is belay-kernel from flags to exit code: 0 done or refused, which it has told the asker,
// 1 it could not answer, 2 wrong flags.
func run(args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("belay-kernel", flag.ContinueOnError)
	flags.SetOutput(stderr)
	keys := flags.String("keys", live.DefaultKeys, "`folder` of the minisign public keys (*.pub) that livepatches are trusted by; root's alone to write")
	containers := flags.String("containers", live.DefaultContainers, "`folder` for livepatches of QEMU, where QEMU can map them; root's alone to write")
	name := flags.String("user", "", "a `user` beside root that may ask: belayd's, if that is another")
	showVersion := flags.Bool("version", false, "print the version and exit")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2
	}
	if *showVersion {
		fmt.Fprintln(stdout, "belay-kernel", version)
		return 0
	}
	var users []uint32
	if *name != "" {
		uid, err := uidOf(*name)
		if err != nil {
			fmt.Fprintf(stderr, "belay-kernel: -user: %v\n", err)
			return 2
		}
		users = append(users, uid)
	}
	conn, err := accepted()
	if err != nil {
		fmt.Fprintf(stderr, "belay-kernel: %v (it is started by belay-kernel.socket)\n", err)
		return 1
	}
	failed := func(asked string, err error) { fmt.Fprintf(stderr, "belay-kernel: %s: %v\n", asked, err) }
	h := host{live.Direct{Keys: *keys}, kexec.Direct{}, live.Libpulp{Keys: *keys, Dir: *containers}}
	remote.Serve(context.Background(), conn, h, failed, users...)
	return 0
}

// host is all of this host that is touched.
type host struct {
	live.Direct
	kexec.Loader
	live.UserSpace
}

// accepted is the connection that systemd has accepted (sd_listen_fds(3)).
func accepted() (*net.UnixConn, error) {
	files := activation.Files(true)
	if len(files) != 1 {
		return nil, fmt.Errorf("it was given %d sockets, not one connection", len(files))
	}
	defer files[0].Close()
	conn, err := net.FileConn(files[0])
	if err != nil {
		return nil, err
	}
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		return nil, fmt.Errorf("it was given a connection of %s, not of a unix socket", conn.LocalAddr().Network())
	}
	return unixConn, nil
}

func uidOf(name string) (uint32, error) {
	if u, err := user.Lookup(name); err == nil {
		name = u.Uid
	}
	uid, err := strconv.ParseUint(name, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("there is no user %q", name)
	}
	return uint32(uid), nil
}
