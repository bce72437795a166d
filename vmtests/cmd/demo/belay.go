package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"belay/agent/maint"
	"belay/vmtests/cluster"
)

// slowMiBs limits the copy that is shown, MiB/s, so that it can be watched.
const slowMiBs = 32

// migration runs belay as its user would, and shows all it says.
func (d *demo) migration(ctx context.Context) error {
	b := d.bed
	from, to, name := b.At(), b.Other(), b.Guest.Spec.Name
	if err := d.belay(ctx, from, nil, "status"); err != nil {
		return err
	}
	d.line("")
	mark := b.Observer.Mark()
	f := &follower{d: d, node: from}
	err := d.belay(ctx, from, f, "migrate", name, "--to", to.Name, "--bandwidth", strconv.Itoa(slowMiBs), "--reason", "demonstration")
	f.wait()
	if err != nil {
		return err
	}
	b.Arrived()
	r, err := b.Since(ctx, mark)
	if err != nil {
		return err
	}
	d.line("")
	d.line("  On the LAN the guest was silent for %s; heartbeats lost in the network: %d.", millis(r.Pause()), r.Lost)
	if err := b.Prove(ctx); err != nil {
		return err
	}
	kept, err := to.Virsh(ctx, "list", "--autostart", "--name")
	if err != nil {
		return err
	}
	if !slices.Contains(strings.Fields(kept), name) {
		return fmt.Errorf("guest %s is not autostarted on %s, and was on %s", name, to.Name, from.Name)
	}
	d.line("  %s runs it, has its definition and starts it at boot, as %s did, where nothing is left.", to.Name, from.Name)
	return nil
}

// belay runs one belay command on a node and shows the command and its output.
// Its messages, on standard error, are shown as they come, with the time, and
// told to f.
func (d *demo) belay(ctx context.Context, n *cluster.Node, f *follower, args ...string) error {
	d.line("  %s# belay %s", n.Name, strings.Join(args, " "))
	begin := time.Now()
	cmd := exec.CommandContext(ctx, d.bed.Bin.Belay, append([]string{"--socket", n.Socket()}, args...)...)
	var out bytes.Buffer
	cmd.Stdout = &out
	said, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("cannot run belay: %w", err)
	}
	for s := bufio.NewScanner(said); s.Scan(); {
		d.at(begin, s.Text())
		if f != nil {
			f.hear(ctx, begin, s.Text())
		}
	}
	err = cmd.Wait()
	for line := range strings.Lines(out.String()) {
		d.line("  %s", strings.TrimRight(line, "\n"))
	}
	if err != nil {
		return fmt.Errorf("belay %s on %s: %w", strings.Join(args, " "), n.Name, err)
	}
	return nil
}

// follower shows how the copy of a migration gets on. belay draws a bar for
// that on a terminal, and its messages otherwise tell the phases only.
type follower struct {
	d    *demo
	node *cluster.Node
	id   maint.OpID // empty until belay has said it
	done sync.WaitGroup
}

// hear learns the operation's name from belay's first message, "ID: phase".
func (f *follower) hear(ctx context.Context, begin time.Time, text string) {
	id, _, ok := strings.Cut(text, ": ")
	if f.id != "" || !ok || !strings.HasPrefix(id, "mig-") {
		return
	}
	f.id = maint.OpID(id)
	f.done.Go(func() {
		var last maint.Job
		// belay itself tells how the operation ends.
		_, _ = f.node.Client().Watch(ctx, f.id, func(op maint.Op) {
			p := op.Progress
			if op.Step != "perform" || p == nil || p.MemoryTotal == 0 || *p == last {
				return
			}
			last = *p
			f.d.at(begin, fmt.Sprintf("    %d of %d MiB left, %d MiB sent, %d MiB/s, pass %d",
				p.MemoryLeft>>20, p.MemoryTotal>>20, p.MemorySent>>20, p.BytesPerSecond>>20, p.Iteration))
		})
	})
}

func (f *follower) wait() { f.done.Wait() }
