package live_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"belay/patch/live"
	"belay/patch/live/livetest"
)

// kernels are those that the fixture trees are of.
var kernels = map[string]func() livetest.Options{"6.1": livetest.Debian12, "newer": livetest.Newer}

func TestContract(t *testing.T) {
	t.Parallel()
	for name, options := range kernels {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := livetest.New(t, t.TempDir(), options())
			v := livetest.NewVendor(t)
			livetest.Contract(t, livetest.Subject{Tree: m.Tree, Kernel: m, Wait: 10 * time.Second,
				A: v.Make("fix_a", m.Release, m.Version, nil), B: v.Make("fix_b", m.Release, m.Version, nil),
				Other: v.Make("fix_c", "5.10.0-30-amd64", m.Version, nil),
				Hold: func() func() {
					m.Hold(120, "worker_thread")
					return func() { m.LetGo(120) }
				}})
		})
	}
}

// TestContractOfThisKernel is for a machine that may be patched: the folder
// BELAY_LIVEPATCHES has a.ko, b.ko and other.ko with their manifests and signatures, and
// the keys in keys/.
func TestContractOfThisKernel(t *testing.T) {
	dir := os.Getenv("BELAY_LIVEPATCHES")
	if dir == "" {
		t.Skip("BELAY_LIVEPATCHES names no folder with livepatches for this kernel")
	}
	read := func(name string) live.Artifact {
		a, err := live.ReadArtifact(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	livetest.Contract(t, livetest.Subject{Kernel: unchecked{live.Direct{Keys: filepath.Join(dir, "keys")}}, Wait: 2 * time.Minute,
		A: read("a.ko"), B: read("b.ko"), Other: read("other.ko")})
}
