package updates

import (
	"os"
	"slices"
	"testing"

	"belay/agent/maint"
	"belay/agent/update"
)

// Each manifest is one, and can be delivered by the rung that it is there to show.
func TestManifests(t *testing.T) {
	t.Parallel()
	rungs := map[string]maint.Rung{Component: maint.RungA, Network: maint.RungB1, QEMU: maint.RungB2, Retire: maint.RungD}
	for _, name := range All() {
		path, err := Write(t.TempDir(), name)
		if err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		u, err := update.Parse(name, text)
		if err != nil {
			t.Fatal(err)
		}
		if got := u.Changes[0].Rungs; len(u.Changes) != 1 || !slices.Equal(got, []maint.Rung{rungs[name]}) {
			t.Errorf("%s: %v", name, got)
		}
	}
	if _, err := Write(t.TempDir(), "other"); err == nil {
		t.Error("there is an update that there is not")
	}
}
