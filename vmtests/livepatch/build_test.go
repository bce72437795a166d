package livepatch_test

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"belay/patch/live"
	"belay/patch/live/livetest"
	"belay/vmtests/guest"
	"belay/vmtests/livepatch"
)

// TestBuild: each module is for the kernel whose image was given, and is what its name says.
func TestBuild(t *testing.T) {
	t.Parallel()
	image, _ := guest.ForTest(t)
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	cache := t.TempDir()
	set, err := livepatch.Build(t.Context(), cache, image.Kernel, log)
	if err != nil {
		t.Fatal(err)
	}
	vendor, keys := livetest.NewVendor(t), filepath.Join(t.TempDir(), "keys")
	vendor.Trust(keys)
	trusted, err := live.ReadKeys(keys)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range livepatch.All() {
		artifact := set.Signed(t, vendor, name, nil)
		m, info, err := artifact.Check(trusted)
		if livepatch := name != livepatch.Sleeper; livepatch != (err == nil) {
			t.Errorf("%s: %v", name, err)
		}
		if info.Name != name || !strings.HasPrefix(info.VerMagic, set.Release+" ") || info.SrcVersion == "" || m.Version != set.Version {
			t.Errorf("%s is of %+v, %+v, want one for %s", name, info, m, set.Release)
		}
	}
	if err := os.Rename(set.File(livepatch.Fix1), set.File("kept")); err != nil {
		t.Fatal(err)
	}
	again, err := livepatch.Build(t.Context(), cache, image.Kernel, log)
	if err != nil || again != set {
		t.Errorf("%+v, then %+v, %v", set, again, err)
	}
	if _, err := os.Stat(set.File("kept")); err != nil {
		t.Errorf("what was there is built again: %v", err)
	}
}

func TestBuildForNoKernel(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "vmlinuz")
	for _, text := range []string{"", "ELF", strings.Repeat("HdrS", 1000)} {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if s, err := livepatch.Build(t.Context(), t.TempDir(), file, slog.Default()); err == nil {
			t.Errorf("for %.10q there is %+v", text, s)
		}
	}
}
