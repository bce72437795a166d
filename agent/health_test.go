package agent_test

import (
	"encoding/json"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"belay/agent/agenttest"
	"belay/agent/config"
	"belay/agent/maint"
	"belay/hypervisor"
	"belay/hypervisor/hypervisortest"
)

// A guest is asked for its health by the host that it leaves, and by the one that it comes
// to; what it says is on record, and decides nothing.
func TestHealthOfAMove(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	t.Cleanup(func() { l.Close() })
	open, closed := l.Addr().String(), ""
	if c, err := net.Listen("tcp", "127.0.0.1:0"); err == nil {
		closed = c.Addr().String()
		c.Close()
	}
	within := config.Duration{Duration: time.Second}
	for _, c := range []struct {
		name          string
		source, dest  config.Health
		before, after string // why not, "" for a healthy guest
	}{
		{"healthy", config.Health{TCP: open}, config.Health{TCP: open}, "", ""},
		{"ill since", config.Health{TCP: open}, config.Health{TCP: closed}, "", "refused"},
		{"ill before", config.Health{TCP: closed}, config.Health{TCP: closed}, "refused", "refused"},
		{"by its agent", config.Health{Command: []string{"/bin/well"}}, config.Health{Command: []string{"/bin/ill"}}, "", "exit code 1"},
		{"talkative", config.Health{Command: []string{"/bin/talk"}}, config.Health{Command: []string{"/bin/talk"}}, "no such", "no such"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := agenttest.New(t, quiet(t), func(cfg *config.Config) {
				h := map[string]config.Health{"a": c.source, "b": c.dest}[cfg.Host]
				h.Guests, h.Within = []string{"web-*"}, within
				other := config.Health{Guests: []string{"db-*"}, TCP: "127.0.0.1:1", Within: within}
				cfg.Health = []config.Health{other, h}
			}, "a", "b")
			uuid := w.Nodes[0].Host.PutGuest("web-1", autostarted, func(g *maint.Guest) { g.Agent = maint.AgentConnected })
			for _, n := range w.Nodes {
				n.Host.OnAgent(runsCommands())
			}
			op := move(t, w)
			if op.Outcome != maint.OutcomeDone {
				t.Fatalf("%s, %v", op.Outcome, op.Problems)
			}
			after := awaitArrival(t, ctxFor(t, patience), w.Nodes[0], op.ID).Health
			says(t, "before", op.HealthBefore, c.before)
			says(t, "after", after, c.after)
			aloneOn(t, w, uuid, "b")
		})
	}
}

func says(t *testing.T, when string, r *maint.HealthReport, why string) {
	t.Helper()
	if r == nil || r.Healthy != (why == "") || !strings.Contains(r.Reason, why) || len(r.Reason) > 300 || r.Tries == 0 || r.Check == "" {
		t.Errorf("%s the move: %+v, want %q", when, r, why)
	}
}

// runsCommands is an agent whose commands end well, but for /bin/ill.
func runsCommands() hypervisortest.Answer {
	return func(_, command string, args json.RawMessage) (any, bool, error) {
		switch command {
		case "guest-exec":
			if strings.Contains(string(args), "/bin/talk") {
				return nil, true, &hypervisor.AgentError{Class: "GenericError", Desc: "no such" + strings.Repeat(" and no such", 100_000)}
			}
			pid := 1
			if strings.Contains(string(args), "/bin/ill") {
				pid = 2
			}
			return map[string]any{"pid": pid}, true, nil
		case "guest-exec-status":
			code := 0
			if strings.Contains(string(args), "2") {
				code = 1
			}
			return map[string]any{"exited": true, "exitcode": code}, true, nil
		}
		return nil, false, nil
	}
}

// Nothing is asked of a guest for which nothing says how, nor of one that is paused.
func TestNoHealth(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, quiet(t), func(cfg *config.Config) {
		cfg.Health = []config.Health{{Guests: []string{"web-2"}, TCP: "127.0.0.1:1", Within: config.Duration{Duration: time.Second}}}
	}, "a", "b")
	a := w.Nodes[0]
	a.Host.PutGuest("web-1")
	a.Host.Pause(t, a.Host.PutGuest("web-2"))
	for _, name := range []string{"web-1", "web-2"} {
		ctx := ctxFor(t, patience)
		op, err := a.Client.Migrate(ctx, maint.MigrateRequest{Guest: name, To: "b"})
		check(t, err)
		op = await(t, ctx, a, op.ID)
		recs, err := a.Client.Records(ctx, op.ID)
		check(t, err)
		if op.Outcome != maint.OutcomeDone || op.HealthBefore != nil || awaitArrival(t, ctx, a, op.ID).Health != nil ||
			slices.ContainsFunc(recs, func(r maint.Record) bool { return r.Kind == maint.RecHealth }) {
			t.Errorf("%s: %s, %+v", name, op.Outcome, op.HealthBefore)
		}
	}
}
