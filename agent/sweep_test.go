package agent_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"belay/agent/agenttest"
	"belay/agent/maint"
)

// When belayd starts, what leashes of operations that have ended have left is
// gone, and what belongs to open ones is there when they are taken up; also
// where belayd is killed before or after that.
func TestLeftoversAreSwept(t *testing.T) {
	t.Parallel()
	for _, at := range []string{"", "before Sweep", "after Sweep"} {
		t.Run("killed "+at, func(t *testing.T) {
			t.Parallel()
			w := agenttest.New(t, quiet(t), nil, "a")
			node := w.Nodes[0]
			node.Host.PutGuest("web-1")
			ctx := ctxFor(t, patience)
			ended, err := node.Client.Hold(ctx, holdAll)
			if err != nil {
				t.Fatal(err)
			}
			await(t, ctx, node, ended.ID)
			began := make(chan struct{})
			node.Steps.Did = func(name string) {
				if strings.HasSuffix(name, "-step") {
					close(began)
				}
			}
			r := holdAll
			r.Step.Command = []string{"sleep", "1h"}
			open, err := node.Client.Hold(ctx, r)
			if err != nil {
				t.Fatal(err)
			}
			<-began
			node.Kill()
			if err := os.Mkdir(node.LeashDir, 0o700); err != nil {
				t.Fatal(err)
			}
			kept := []string{string(open.ID) + ".lock", string(open.ID) + "-home.sock"}
			for _, name := range append(kept, string(ended.ID)+".json", string(ended.ID)+"-away.lock", "hold-unknown.sock") {
				if err := os.WriteFile(filepath.Join(node.LeashDir, name), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			slices.Sort(kept)
			if at != "" {
				dead := make(chan struct{})
				node.RestartWith(func(what string) {
					if what == at {
						node.Kill()
						close(dead)
					}
				})
				<-dead
			}
			left := make(chan []string, 1)
			node.RestartWith(func(what string) {
				if what == "after Sweep" {
					var names []string
					entries, _ := os.ReadDir(node.LeashDir)
					for _, e := range entries {
						names = append(names, e.Name())
					}
					left <- names
				}
			})
			select {
			case got := <-left:
				if !slices.Equal(got, kept) {
					t.Errorf("left is %q, want %q", got, kept)
				}
			case <-ctx.Done():
				t.Fatal("nobody sweeps")
			}
			if op := await(t, ctx, node, open.ID); op.Outcome != maint.OutcomeFailed || op.Held == nil {
				t.Errorf("the open one ended %s: %v", op.Outcome, op.Problems)
			}
		})
	}
}
