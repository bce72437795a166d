package vmtests

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/vmtests/lab"
	"belay/vmtests/observer"
)

// Who can die in a hold.
const (
	belaydDies  = "belayd"
	leashDies   = "leash"
	libvirtDies = "libvirtd"
)

// restartAfter is that of belayd's unit: nothing else starts it in a lab.
const restartAfter = 2 * time.Second

// tolerance is how long after the deadline every guest runs, whatever has died.
const tolerance = 2 * time.Second

// strike is one round of the campaign: what dies, when, and when it is back.
type strike struct {
	victims []string
	// moment is from what on after is counted: "asked" (belay is started)
	// or "armed" (the leash is there, and guests are about to be paused).
	moment string
	after  time.Duration
	apart  time.Duration // between the first victim and the second
	// back is when libvirtd is there again after its death; late, when it
	// and belayd are only after the deadline and tolerance.
	back     time.Duration
	late     bool
	maxPause time.Duration
}

func (s strike) String() string {
	text := fmt.Sprintf("%s %s after %s", strings.Join(s.victims, "+"), s.after.Round(time.Millisecond), s.moment)
	if len(s.victims) > 1 {
		text += fmt.Sprintf(", %s apart", s.apart.Round(time.Millisecond))
	}
	if slices.Contains(s.victims, libvirtDies) && !s.late {
		text += fmt.Sprintf(", libvirtd back after %s", s.back.Round(time.Millisecond))
	}
	if s.late {
		text += ", back late"
	}
	return text + fmt.Sprintf(", max pause %s", s.maxPause)
}

func (s strike) kills(who string) bool { return slices.Contains(s.victims, who) }

// newStrike makes the strike of a round: the same one for the same seed. Victims have
// their turns, all else is random.
func newStrike(seed uint64, round int) strike {
	r := rand.New(rand.NewPCG(seed, uint64(round)))
	upTo := func(d time.Duration) time.Duration { return time.Duration(r.Int64N(int64(d))) }
	all := [][]string{{belaydDies}, {leashDies}, {libvirtDies}, {belaydDies, leashDies}, {leashDies, belaydDies},
		{belaydDies, libvirtDies}, {libvirtDies, belaydDies}, {leashDies, libvirtDies}, {libvirtDies, leashDies}}
	s := strike{victims: all[round%len(all)], moment: "armed", maxPause: 3 * time.Second}
	switch r.IntN(5) {
	case 0: // before
		s.moment, s.after = "asked", upTo(500*time.Millisecond)
	case 1: // while guests are being paused
		s.after = upTo(100 * time.Millisecond)
	case 2, 3: // while they are held
		s.after = 100*time.Millisecond + upTo(time.Second)
	default: // while they are being released, and after
		s.after = time.Second + upTo(600*time.Millisecond)
	}
	if r.IntN(2) == 0 {
		s.apart = upTo(700 * time.Millisecond)
	}
	s.back = 100*time.Millisecond + upTo(900*time.Millisecond)
	// Nobody but belayd starts a leash again where systemd does not run: both
	// cannot stay away.
	s.late = r.IntN(4) == 0 && (s.kills(libvirtDies) || s.kills(belaydDies)) && !(s.kills(belaydDies) && s.kills(leashDies))
	if r.IntN(8) == 0 {
		s.maxPause = 5 * time.Second
	}
	return s
}

// TestHoldCampaign holds guests again and again, and at a random moment belayd,
// the leash, libvirtd or two of them die of SIGKILL.
//
// BELAY_SEED=N repeats a campaign's strikes, BELAY_SEED=N/ROUND one of them;
// BELAY_ROUNDS=N is how many there are, 4 by default and 500 with BELAY_LONG.
func TestHoldCampaign(t *testing.T) {
	t.Parallel()
	rounds, guests := 4, 2
	if long() {
		rounds, guests = 500, 3
	}
	if text := os.Getenv("BELAY_ROUNDS"); text != "" {
		var err error
		if rounds, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	seed, first := rand.Uint64(), 0
	if text := os.Getenv("BELAY_SEED"); text != "" {
		base, round, one := strings.Cut(text, "/")
		var err error
		if seed, err = strconv.ParseUint(base, 10, 64); err != nil {
			t.Fatal(err)
		}
		if one {
			if first, err = strconv.Atoi(round); err != nil {
				t.Fatal(err)
			}
			rounds = first + 1
		}
	}
	t.Logf("BELAY_SEED=%d", seed)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute+time.Duration(rounds)*time.Minute)
	defer cancel()
	c := &campaign{ward: newWard(t, guests), outcomes: make(map[maint.Outcome]int)}
	before := c.look(ctx)
	begun := time.Now()
	for round := first; round < rounds; round++ {
		c.round(ctx, round, newStrike(seed, round))
	}
	t.Logf("%d rounds in %s: %v; the longest standstill %s; the leash fired %d times, %d times past libvirt",
		rounds-first, time.Since(begun).Round(time.Second), c.outcomes, c.longest.Round(time.Millisecond), c.fired, c.monitor)
	c.same(before, c.look(ctx))
}

// campaign is a ward under attack.
type campaign struct {
	*ward
	outcomes       map[maint.Outcome]int
	longest        time.Duration
	fired, monitor int
}

// round is one hold with one strike, and all that must be so afterwards.
func (c *campaign) round(ctx context.Context, n int, s strike) {
	c.t.Helper()
	e := c.try(ctx, strconv.Itoa(n))
	marked := time.Now()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		e.hold(ctx, "--all", "--max-pause", s.maxPause.String(), "--undo", "echo undo >>"+string(e.trail),
			"--", "sh", "-c", "echo begin >>$0; sleep 1; echo end >>$0", string(e.trail))
	}()
	b := c.strike(ctx, s)
	<-ended
	b.healed(c.t)
	e.end(ctx)
	struck := time.Since(e.begun)
	if e.op.Outcome == maint.OutcomeBlocked && s.kills(leashDies) {
		// One that refused its order and is killed before it ends by itself
		// leaves a lock and a socket, which nobody misses.
		for _, ext := range []string{".lock", ".sock"} {
			_ = os.Remove(c.Path("/run/belay/leash/" + string(e.op.ID) + ext))
		}
	}
	wrong := e.wrong(ctx, func(gap observer.Gap) time.Duration {
		limit := s.maxPause + tolerance // from the arming, so it is more than that
		if !b.alone.IsZero() {          // nobody was there for so long
			limit = max(limit, b.alone.Sub(marked)-gap.Start+tolerance)
		}
		return limit
	})
	c.longest = max(c.longest, e.gap)
	c.outcomes[e.op.Outcome]++
	ways := e.ways()
	if e.fired() {
		c.fired++
	}
	if ways["monitor"] > 0 {
		c.monitor++
	}
	c.t.Logf("round %d: %s: %q (exit code %d), stood still for %s (noise %s), leash fired: %t %v; %s, then %s; %s", n, s, e.op.Outcome, e.result.Code,
		e.gap.Round(time.Millisecond), e.noise.Round(time.Millisecond), e.fired(), ways, struck.Round(time.Millisecond), (time.Since(e.begun) - struck).Round(time.Millisecond), e.clocks())
	if len(wrong) > 0 {
		c.t.Fatalf("round %d: %s:%s", n, s, e.everything(wrong))
	}
}

// blow is a strike that was carried out.
type blow struct {
	// alone is when belayd was started again where the leash was dead too.
	alone time.Time
	back  []chan error
}

// healed waits until what was killed is back.
func (b *blow) healed(t *testing.T) {
	t.Helper()
	for _, c := range b.back {
		if err := <-c; err != nil {
			t.Fatal(err)
		}
	}
}

// strike waits for its moment, kills and has the victims come back.
func (c *campaign) strike(ctx context.Context, s strike) *blow {
	c.t.Helper()
	b := new(blow)
	if s.moment == "armed" {
		c.awaitLeash(ctx, 10*time.Second)
	}
	armed := time.Now()
	sleep(ctx, s.after)
	for i, who := range s.victims {
		if i > 0 {
			sleep(ctx, s.apart)
		}
		if err := c.kill(ctx, who); err != nil {
			c.t.Fatal(err)
		}
		died := time.Now()
		if who == leashDies {
			continue
		}
		wait := s.back
		if who == belaydDies {
			wait = restartAfter
		}
		if s.late {
			wait = max(wait, time.Until(armed.Add(s.maxPause+tolerance)))
		}
		back := make(chan error, 1)
		b.back = append(b.back, back)
		if who == belaydDies && s.kills(leashDies) {
			b.alone = died.Add(wait)
		}
		go func() {
			sleep(ctx, wait)
			if who == belaydDies {
				back <- c.Start(ctx)
			} else {
				back <- c.StartDaemon(ctx, lab.Libvirtd)
			}
		}()
	}
	return b
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// kill sends SIGKILL. A leash that there is not, not yet or not any more, is
// spared.
func (c *campaign) kill(ctx context.Context, who string) error {
	switch who {
	case belaydDies:
		return c.Kill()
	case libvirtDies:
		return c.Host.Kill(ctx, lab.Libvirtd, syscall.SIGKILL)
	}
	for _, pid := range c.processes(leashComm) {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && err != syscall.ESRCH {
			return err
		}
	}
	return nil
}

// awaitLeash returns when a leash has made its files, or in time.
func (w *ward) awaitLeash(ctx context.Context, within time.Duration) bool {
	for end := time.Now().Add(within); time.Now().Before(end) && ctx.Err() == nil; time.Sleep(time.Millisecond) {
		if files, _ := os.ReadDir(w.Path("/run/belay/leash")); len(files) > 0 {
			return true
		}
	}
	return false
}
