package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"belay/agent/maint"
	"belay/vmtests/cluster"
)

// command shows a belay command that is run on a host.
func (d *demo) command(n *cluster.Node, args ...string) {
	d.line("  %s# belay %s", n.Name, strings.Join(args, " "))
}

// quietly runs one belay command on a node, in the folder of the manifests, and returns
// what it prints.
func (d *demo) quietly(ctx context.Context, n *cluster.Node, args ...string) (string, error) {
	cmd := d.cli(ctx, n, args...)
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("belay %s on %s: %w: %s", strings.Join(args, " "), n.Name, err, said.String())
	}
	return out.String(), nil
}

func (d *demo) cli(ctx context.Context, n *cluster.Node, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, d.bin.Belay, append([]string{"--socket", n.Socket()}, args...)...)
	cmd.Dir = d.dir
	return cmd
}

// belay runs a belay command that begins an operation, shows how that gets on, as it does,
// and returns its name.
func (d *demo) belay(ctx context.Context, n *cluster.Node, args ...string) (maint.OpID, error) {
	d.command(n, args...)
	begin := time.Now()
	cmd := d.cli(ctx, n, args...)
	var out bytes.Buffer
	cmd.Stdout = &out
	said, err := cmd.StderrPipe()
	if err != nil {
		return "", err
	}
	if err := cmd.Start(); err != nil {
		return "", fmt.Errorf("cannot run belay: %w", err)
	}
	var op maint.OpID
	for s := bufio.NewScanner(said); s.Scan(); {
		id, text, ok := strings.Cut(s.Text(), ": ")
		switch {
		case ok && op == "" && !strings.Contains(id, " "):
			op = maint.OpID(id)
			d.at(begin, "operation "+id)
			fallthrough
		case ok && maint.OpID(id) == op:
			d.at(begin, text)
		default:
			d.at(begin, s.Text())
		}
	}
	if err := cmd.Wait(); err != nil {
		return op, fmt.Errorf("belay %s on %s: %w\n%s", strings.Join(args, " "), n.Name, err, out.String())
	}
	return op, nil
}
