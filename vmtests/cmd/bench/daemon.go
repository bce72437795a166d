package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"belay/agent/maint"
	"belay/vmtests/cluster"
	"belay/vmtests/guest"
	"belay/vmtests/lab"
)

const (
	domains    = 50
	idleFor    = time.Minute
	clockTicks = 100 // of /proc/PID/stat a second: USER_HZ, see proc(5)
)

// benchDaemon measures what belayd costs while nothing happens, and how long
// an operator waits for belay status, with 50 domains defined in real libvirt.
func benchDaemon(ctx context.Context, bin cluster.Binaries, rounds int) error {
	l, err := lab.Up(ctx, lab.Config{Name: "bench"})
	if err != nil {
		return err
	}
	defer down(l)
	c, err := cluster.Up(ctx, l, bin)
	if err != nil {
		return err
	}
	defer c.Down()
	n := c.Nodes[0]
	for i := range domains {
		if err := define(ctx, n, fmt.Sprintf("idle-%d", i)); err != nil {
			return err
		}
	}

	if err := settled(ctx, n); err != nil {
		return err
	}
	heading("belay status, %d domains defined, %d runs each, alternating", domains, rounds)
	var belay, virsh []time.Duration
	for range rounds {
		begun := time.Now()
		if r, err := n.Belay(ctx, "status"); err != nil || r.Code != 0 || !strings.Contains(r.Stdout, fmt.Sprintf("%d shut off", domains)) {
			return fmt.Errorf("belay status: %v: %+v", err, r)
		}
		belay = append(belay, time.Since(begun))
		begun = time.Now()
		cmd := exec.CommandContext(ctx, "virsh", "-q", "-c", n.URI(), "list", "--all")
		if out, err := cmd.Output(); err != nil || strings.Count(string(out), "idle-") != domains {
			return fmt.Errorf("virsh list: %v: %s", err, out)
		}
		virsh = append(virsh, time.Since(begun))
	}
	line("belay status", "median %s, p99 %s", ms(quantile(belay, .5)), ms(quantile(belay, .99)))
	line("virsh list --all", "median %s, p99 %s", ms(quantile(virsh, .5)), ms(quantile(virsh, .99)))
	line("ratio of medians", "%.2f", ratio(quantile(belay, .5), quantile(virsh, .5)))
	verdict("belay status p99 under 50 ms", quantile(belay, .99) < 50*time.Millisecond)

	heading("belayd idle, %d domains defined, over %s", domains, idleFor)
	cpu, err := cpuTime(n.PID())
	if err != nil {
		return err
	}
	select {
	case <-time.After(idleFor):
	case <-ctx.Done():
		return ctx.Err()
	}
	after, err := cpuTime(n.PID())
	if err != nil {
		return err
	}
	rss, err := residentKiB(n.PID())
	if err != nil {
		return err
	}
	share := 100 * (after - cpu).Seconds() / idleFor.Seconds()
	line("resident memory", "%.1f MiB", float64(rss)/1024)
	line("processor", "%.2f %% of one core", share)
	verdict("under 30 MiB", rss < 30<<10)
	verdict("under 0.5 % of a core", share < 0.5)
	return nil
}

func define(ctx context.Context, n *cluster.Node, name string) error {
	f, err := os.CreateTemp("", "belay-bench-*.xml")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = fmt.Fprintf(f, "<domain type='qemu'><name>%s</name><memory unit='MiB'>64</memory><os><type arch='x86_64' machine='%s'>hvm</type></os></domain>", name, guest.Machine)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	_, err = n.Virsh(ctx, "define", f.Name())
	return err
}

// settled waits until belayd has seen all domains.
func settled(ctx context.Context, n *cluster.Node) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		s, err := n.Client().Status(ctx)
		if err != nil {
			return err
		}
		if s.Guests[maint.GuestShutoff] == domains {
			return nil
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// cpuTime is what the process has used so far, in user and system mode.
func cpuTime(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The second field is the program's name in parentheses.
	_, rest, ok := strings.Cut(string(b), ") ")
	f := strings.Fields(rest)
	if !ok || len(f) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat: %q", pid, b)
	}
	var ticks int64
	for _, s := range f[11:13] {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return time.Duration(ticks) * time.Second / clockTicks, nil
}

// residentKiB is VmRSS of /proc/PID/status.
func residentKiB(pid int) (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			return strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(v), " kB"))
		}
	}
	return 0, fmt.Errorf("/proc/%d/status has no VmRSS", pid)
}

// quantile is the q-th of the samples, 0.5 being the median.
func quantile(d []time.Duration, q float64) time.Duration {
	s := slices.Sorted(slices.Values(d))
	return s[int(q*float64(len(s)-1)+.5)]
}
