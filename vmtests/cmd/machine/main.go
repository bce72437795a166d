// Command machine makes the image of hosts that are whole machines, and brings such hosts up
// by hand; package machine says what they are.
//
//	machine image         makes the image, unless it is there, and prints its folder
//	machine box FOLDER    makes a box for Vagrant, and what the Vagrantfile's hosts need
//	machine up [HOSTS]    brings up one or two hosts, prints how to log in, and takes them
//	                      down on Ctrl-C
//
// Exit codes: 0 done, 1 failed, 2 wrong usage.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strconv"
	"syscall"

	"belay/vmtests/guest"
	"belay/vmtests/machine"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second Ctrl-C ends the process at once
	os.Exit(run(ctx, os.Args[1:]))
}

func run(ctx context.Context, args []string) int {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	var err error
	switch {
	case len(args) == 1 && args[0] == "image":
		var img machine.Image
		if img, err = machine.Build(ctx, guest.DefaultCache(), log); err == nil {
			fmt.Println(img.Dir)
		}
	case len(args) == 2 && args[0] == "box":
		err = machine.Box(ctx, args[1], 2, log)
	case len(args) >= 1 && len(args) <= 2 && args[0] == "up":
		hosts := 1
		if len(args) == 2 {
			if hosts, err = strconv.Atoi(args[1]); err != nil {
				return usage()
			}
		}
		err = up(ctx, machine.Config{Hosts: hosts, Log: log})
	default:
		return usage()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "machine:", err)
		return 1
	}
	return 0
}

func usage() int {
	fmt.Fprintln(os.Stderr, "usage: machine image | machine box FOLDER | machine up [HOSTS]")
	return 2
}

func up(ctx context.Context, c machine.Config) error {
	l, err := machine.Up(ctx, c)
	if err != nil {
		return err
	}
	for _, h := range l.Hosts {
		fmt.Printf("%s: %s\n", h.Name, h.SSH())
	}
	<-ctx.Done()
	return l.Down()
}
