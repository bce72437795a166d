package guest_test

import (
	"context"
	"errors"
	"math"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"belay/vmtests/guest"
	"belay/vmtests/lab"
	"belay/vmtests/observer"
	"belay/vmtests/probe"
)

// The rulers' error in a known pause: a tenth of it or 30 ms, whichever is
// more, besides the largest hole that the train had just before without any
// pause. The latter is nothing on a quiet machine.
const (
	pauseErrorShare = 0.1
	pauseErrorLeast = 30 * time.Millisecond
)

// TestRulers holds what the observer and the probe say against causes whose
// size is known from elsewhere.
func TestRulers(t *testing.T) {
	w := newWorld(t, 1)
	ctx := timeout(t, 5*time.Minute)
	h := w.Hosts[0]
	s := w.spec("ruler", 1)
	_, c := w.start(t, ctx, h, s)

	t.Run("train", func(t *testing.T) { w.checkTrain(t, ctx, s.Name) })
	for _, d := range []time.Duration{300 * time.Millisecond, time.Second} {
		t.Run("pause "+d.String(), func(t *testing.T) { w.checkPause(t, ctx, h, c, s.Name, d) })
	}
	t.Run("path", func(t *testing.T) { w.checkPath(t, ctx, c, s.Name) })
	t.Run("dirty rate", func(t *testing.T) { checkRate(t, ctx, c) })
	t.Run("control", func(t *testing.T) { w.checkControl(t, ctx, h, c, s.Name) })
}

// checkTrain looks at the train when nothing is done to the guest.
func (w *world) checkTrain(t *testing.T, ctx context.Context, name string) {
	m := w.obs.Mark()
	w.await(t, ctx, name, 1000)
	r := w.obs.Since(m, name)
	rate := float64(r.Received) / r.Span.Seconds()
	t.Logf("%.0f heartbeats/s, %d skipped; gaps: median %v, p99 %v, largest %v; clock off by %v ± %v",
		rate, r.Skipped, r.MedianGap, r.P99Gap, r.LargestGap.Length, r.ClockAfter.Value, r.ClockAfter.Error)
	if r.Lost != 0 || r.Duplicated != 0 || r.Reordered != 0 || r.Restarts != 0 || r.ReceiverDrops != 0 || r.Interval != time.Millisecond {
		t.Errorf("nothing was done to the train: %+v", r)
	}
	// Sent and skipped together follow the guest's clock.
	ticks := float64(r.Received) + float64(r.Skipped)
	if want := (r.Span - r.Standstill).Seconds() * 1000; math.Abs(ticks-want) > 0.05*want+50 {
		t.Errorf("%.0f ticks in %v", ticks, r.Span)
	}
}

func (w *world) await(t *testing.T, ctx context.Context, name string, n int) {
	t.Helper()
	if err := w.obs.Await(ctx, name, n); err != nil {
		t.Fatal(err)
	}
}

// checkPause suspends the guest. How long it really stood is QEMU's word, from
// the times of its STOP and RESUME events.
func (w *world) checkPause(t *testing.T, ctx context.Context, h *lab.Host, c *guest.Control, name string, d time.Duration) {
	before, err := c.Verify(ctx)
	if err != nil {
		t.Fatal(err)
	}
	quiet := w.obs.Mark()
	w.await(t, ctx, name, 500)
	base := w.obs.Since(quiet, name).LargestGap.Length

	m := w.obs.Mark()
	real, err := pause(ctx, h, name, d)
	if err != nil {
		t.Fatal(err)
	}
	w.await(t, ctx, name, 300)
	r := w.obs.Since(m, name)

	tolerance := max(time.Duration(pauseErrorShare*float64(real)), pauseErrorLeast) + base
	step, bar, ok := r.ClockStep()
	t.Logf("QEMU %v; gap less interval %v; guest's clock stood %v, stepped %v ± %v; largest gap before %v",
		real, r.Pause(), r.Standstill, step, bar, base)
	if diff := (r.Pause() - real).Abs(); diff > tolerance {
		t.Errorf("paused for %v, measured %v: off by %v, more than %v", real, r.Pause(), diff, tolerance)
	}
	if diff := (r.Standstill - real).Abs(); diff > tolerance {
		t.Errorf("paused for %v, the clock stood still for %v", real, r.Standstill)
	}
	if diff := (step + real).Abs(); !ok || diff > tolerance+bar {
		t.Errorf("paused for %v, the clock stepped by %v ± %v, %t", real, step, bar, ok)
	}
	if r.Lost != 0 || r.Restarts != 0 {
		t.Errorf("a pause lost heartbeats: %+v", r)
	}
	after, err := c.Verify(ctx)
	if err != nil || !after.OK() || after.Checksum != before.Checksum || after.FixedChecksum != before.FixedChecksum {
		t.Errorf("memory before %+v, after %+v, %v", before, after, err)
	}
}

var monitorEvent = regexp.MustCompile(`(?m)^event (STOP|RESUME) at ([0-9]+)\.([0-9]{6}) `)

// pause suspends a guest for d and returns for how long QEMU held it.
func pause(ctx context.Context, h *lab.Host, name string, d time.Duration) (time.Duration, error) {
	// virsh says nothing when it has begun to listen; when it was too late,
	// once more.
	for range 3 {
		type result struct {
			text string
			err  error
		}
		heard := make(chan result, 1)
		go func() {
			text, err := h.Virsh(ctx, "qemu-monitor-event", "--domain", name, "--loop", "--timeout", "3")
			heard <- result{text, err}
		}()
		time.Sleep(500 * time.Millisecond)
		if _, err := h.Virsh(ctx, "suspend", name); err != nil {
			return 0, err
		}
		time.Sleep(d)
		if _, err := h.Virsh(ctx, "resume", name); err != nil {
			return 0, err
		}
		got := <-heard
		at := map[string]time.Duration{}
		for _, e := range monitorEvent.FindAllStringSubmatch(got.text, -1) {
			sec, _ := strconv.ParseInt(e[2], 10, 64) // digits by the expression
			us, _ := strconv.ParseInt(e[3], 10, 64)
			at[e[1]] = time.Duration(sec)*time.Second + time.Duration(us)*time.Microsecond
		}
		if len(at) == 2 {
			return at["RESUME"] - at["STOP"], nil
		}
	}
	return 0, errors.New("virsh saw no STOP and RESUME")
}

func checkRate(t *testing.T, ctx context.Context, c *guest.Control) {
	const want = 20.0
	if _, err := c.Dirty(ctx, probe.DirtySettings{RateMiBs: want, WorkingSetMiB: 16, Random: true}); err != nil {
		t.Fatal(err)
	}
	var m probe.MemoryStatus
	for m.Dirtied < 20<<20 {
		st, err := c.Status(ctx)
		if err != nil {
			t.Fatal(err)
		}
		m = st.Memory
	}
	rate := float64(m.Dirtied) / (1 << 20) / m.Dirtying.Seconds()
	t.Logf("dirtied %.1f MiB/s", rate)
	// An emulated CPU on a busy machine may not keep up, but never is it ahead.
	if rate > want*1.05 || rate < want*0.2 {
		t.Errorf("dirtied %.1f MiB/s, want %.0f", rate, want)
	}
	if r, err := c.Verify(ctx); err != nil || !r.OK() {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := c.Dirty(ctx, probe.DirtySettings{}); err != nil {
		t.Error(err)
	}
}

// checkControl tries the channel: calls side by side, a client that leaves in
// the middle of a question, a second client, a guest that stands still.
func (w *world) checkControl(t *testing.T, ctx context.Context, h *lab.Host, c *guest.Control, name string) {
	failed := make(chan error, 20)
	for range cap(failed) {
		go func() { _, err := c.Status(ctx); failed <- err }()
	}
	for range cap(failed) {
		if err := <-failed; err != nil {
			t.Error(err)
		}
	}

	short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	second := w.dial(t, ctx, h, name)
	if _, err := second.Status(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a second client was answered: %v", err)
	}
	// The first leaves with a question under way.
	leaving := make(chan error, 1)
	go func() { _, err := c.Verify(ctx); leaving <- err }()
	c.Close()
	if err := <-leaving; err == nil {
		t.Log("the answer was faster")
	}
	if _, err := c.Status(ctx); err == nil {
		t.Error("a closed connection answers")
	}
	if st, err := second.Status(ctx); err != nil || st.Guest != name {
		t.Errorf("second client after the first left: %+v, %v", st, err)
	}

	virsh(t, ctx, h, "suspend", name)
	frozen, cancel2 := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel2()
	if _, err := second.Status(frozen); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a paused guest answers: %v", err)
	}
	virsh(t, ctx, h, "resume", name)
	if st, err := second.Heartbeat(ctx, probe.HeartbeatSettings{IntervalUs: 5000}); err != nil || st.IntervalUs != 5000 {
		t.Errorf("after resume: %+v, %v", st, err)
	}
	w.await(t, ctx, name, 20)
	if r := w.obs.Since(w.obs.Mark(), name); r.Interval != 5*time.Millisecond {
		t.Errorf("interval %v", r.Interval)
	}
}

// TestGuestMigrates moves a guest with a disk while it dirties memory. All
// rulers go on: same boot, sound memory and disk, one gap.
func TestGuestMigrates(t *testing.T) {
	w := newWorld(t, 2)
	ctx := timeout(t, 5*time.Minute)
	a, b := w.Hosts[0], w.Hosts[1]
	s := w.spec("mover", 1)
	s.IntervalUs = 20_000
	var err error
	if s.Disk, err = w.AddDisk(ctx, "mover", 16<<20); err != nil {
		t.Fatal(err)
	}
	g, c := w.start(t, ctx, a, s)
	disk := probe.DiskSettings{SizeMiB: 4, Seed: 1}
	wrote, err := c.DiskWrite(ctx, disk)
	if err != nil {
		t.Fatal(err)
	}
	before, err := c.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	fixed, err := c.Verify(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Dirty(ctx, probe.DirtySettings{RateMiBs: 4}); err != nil {
		t.Fatal(err)
	}
	w.await(t, ctx, s.Name, 20)

	m := w.obs.Mark()
	begin := time.Now()
	virsh(t, ctx, a, "migrate", "--live", "--p2p", "--persistent", "--undefinesource", s.Name, b.PeerURI(false))
	took := time.Since(begin)
	w.await(t, ctx, s.Name, 20)
	r := w.obs.Since(m, s.Name)
	t.Logf("moved in %v; pause %v, standstill %v, lost %d; libvirt: %s", took.Round(time.Millisecond), r.Pause(), r.Standstill,
		r.Lost, downtime(virsh(t, ctx, b, "domjobinfo", "--completed", s.Name)))
	checkArrived(t, ctx, w.dial(t, ctx, b, s.Name), before, fixed, disk, wrote, r)
	if _, err := guest.Dial(ctx, a, s.Name); err == nil {
		t.Error("the source still has it")
	}
	if err := g.AgentPing(ctx, b); err != nil {
		t.Error(err)
	}
	if err := g.Destroy(ctx, b); err != nil {
		t.Error(err)
	}
}

func checkArrived(t *testing.T, ctx context.Context, c *guest.Control, before probe.Status, fixed probe.MemoryReport,
	disk probe.DiskSettings, wrote probe.DiskReport, r observer.Report) {
	t.Helper()
	after, err := c.Status(ctx)
	if err != nil || after.BootID != before.BootID || after.Incarnation != before.Incarnation {
		t.Errorf("before %+v, after %+v, %v", before, after, err)
	}
	if v, err := c.Verify(ctx); err != nil || !v.OK() || v.FixedChecksum != fixed.FixedChecksum {
		t.Errorf("memory: %+v, %v", v, err)
	}
	if d, err := c.DiskVerify(ctx, disk); err != nil || d.BadBlocks != 0 || d.Checksum != wrote.Checksum {
		t.Errorf("disk: wrote %+v, read %+v, %v", wrote, d, err)
	}
	if k, err := c.Kmsg(ctx); err != nil || k.Bugs != 0 {
		t.Errorf("kernel log: %+v, %v", k, err)
	}
	if r.Restarts != 0 || r.Duplicated != 0 || r.LargestGap.Open || r.Pause() > 10*time.Second {
		t.Errorf("heartbeats: %+v", r)
	}
}

// downtime is libvirt's own figure, for the log.
func downtime(jobinfo string) string {
	for line := range strings.Lines(jobinfo) {
		if strings.Contains(line, "Total downtime") {
			return strings.Join(strings.Fields(line), " ")
		}
	}
	return "no downtime"
}
