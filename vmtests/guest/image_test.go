package guest

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"belay/vmtests/imagecache"
)

// cachedKernel is a cache with nothing but the kernel package in it, which is
// not to be fetched again.
func cachedKernel(t *testing.T) string {
	t.Helper()
	img, _ := ForTest(t)
	debs, err := filepath.Glob(filepath.Join(filepath.Dir(filepath.Dir(img.Kernel)), "*.deb"))
	if err != nil || len(debs) == 0 {
		t.Fatalf("no kernel package in the cache: %v", err)
	}
	dir := t.TempDir()
	for _, deb := range debs {
		if err := os.Symlink(deb, filepath.Join(dir, filepath.Base(deb))); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// Builders side by side make one image; a later one finds it.
func TestBuildTogether(t *testing.T) {
	dir := cachedKernel(t)
	log := slog.New(slog.DiscardHandler)
	var wg sync.WaitGroup
	images := make([]Image, 3)
	for i := range images {
		wg.Go(func() {
			var err error
			if images[i], err = Build(t.Context(), dir, log); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	st, err := os.Stat(images[0].Initrd)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("initramfs of %d KiB", st.Size()/1024)
	if images[1] != images[0] || images[2] != images[0] {
		t.Errorf("images differ: %v", images)
	}
	left, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range left {
		if strings.HasPrefix(filepath.Base(f), "new-image-") {
			t.Errorf("left behind: %s", f)
		}
	}
	if again, err := Build(t.Context(), dir, log); err != nil || again != images[0] {
		t.Errorf("again: %v, %v", again, err)
	}
	if now, err := os.Stat(images[0].Initrd); err != nil || !now.ModTime().Equal(st.ModTime()) {
		t.Error("the image was built twice")
	}

	old := filepath.Join(dir, "image-old")
	if err := os.Mkdir(old, 0o755); err != nil {
		t.Fatal(err)
	}
	long := time.Now().Add(-2 * imagecache.Keep)
	if err := os.Chtimes(old, long, long); err != nil {
		t.Fatal(err)
	}
	imagecache.Prune(dir, "image-*", log)
	if _, err := os.Stat(old); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an old image is still there: %v", err)
	}
	if _, err := os.Stat(images[0].Kernel); err != nil {
		t.Error(err)
	}
}

// The archive is read back by the cpio program.
func TestArchive(t *testing.T) {
	if _, err := exec.LookPath("cpio"); err != nil {
		t.Skip("no cpio program to read the archive with")
	}
	var a archive
	a.dir("d")
	a.file("d/one", 0o755, []byte("1"))
	a.file("d/four", 0o644, []byte("1234"))
	a.file("d/none", 0o600, nil)
	a.link("link", "d/one")
	cmd := exec.Command("cpio", "--extract", "--quiet", "--no-absolute-filenames")
	cmd.Dir = t.TempDir()
	cmd.Stdin = bytes.NewReader(a.finish())
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for name, want := range map[string]string{"d/one": "1", "d/four": "1234", "d/none": "", "link": "1"} {
		if b, err := os.ReadFile(filepath.Join(cmd.Dir, name)); err != nil || string(b) != want {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
	if st, err := os.Stat(filepath.Join(cmd.Dir, "d/one")); err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("mode: %v, %v", st, err)
	}
}

func TestContains(t *testing.T) {
	for text, want := range map[string]bool{
		"":                         false,
		"xx" + upMarker:            true,
		"belay-init: uq":           false,
		strings.Repeat("ab", 9000): false,
		strings.Repeat("b", 4090) + upMarker + "\n": true, // across two reads
	} {
		if got := contains(fewBytes{strings.NewReader(text)}, upMarker); got != want {
			t.Errorf("%.20q… of %d: %t", text, len(text), got)
		}
	}
}

// fewBytes returns few bytes at a time.
type fewBytes struct{ r io.Reader }

func (o fewBytes) Read(b []byte) (int, error) { return o.r.Read(b[:min(len(b), 5)]) }

func TestDetectAccelOverride(t *testing.T) {
	for _, a := range []Accel{TCG, KVM} {
		t.Setenv("BELAY_ACCEL", string(a))
		if got, _, err := DetectAccel(t.Context(), Image{}, nil); err != nil || got != a {
			t.Errorf("%s: %s, %v", a, got, err)
		}
	}
	t.Setenv("BELAY_ACCEL", "xen")
	if _, _, err := DetectAccel(t.Context(), Image{}, nil); err == nil {
		t.Error("xen was taken")
	}
}

// The verdict is tried for once, and again when the machine has booted since.
func TestDetectAccelRemembers(t *testing.T) {
	img, _ := ForTest(t)
	t.Setenv("BELAY_ACCEL", "")
	dir := t.TempDir()
	if err := os.Symlink(filepath.Dir(img.Kernel), filepath.Join(dir, "image")); err != nil {
		t.Fatal(err)
	}
	img.Kernel, img.Initrd = filepath.Join(dir, "image", "vmlinuz"), filepath.Join(dir, "image", "initrd")
	log := slog.New(slog.DiscardHandler)
	first, reason, err := DetectAccel(t.Context(), img, log)
	if err != nil || reason == "" {
		t.Fatalf("%q, %v", reason, err)
	}
	t.Logf("%s: %s", first, reason)
	cache := filepath.Join(dir, "accel.json")
	edit := func(change func(*verdict)) {
		t.Helper()
		b, err := os.ReadFile(cache)
		if err != nil {
			t.Fatal(err)
		}
		var v verdict
		if err := json.Unmarshal(b, &v); err != nil {
			t.Fatal(err)
		}
		change(&v)
		if b, err = json.Marshal(v); err == nil {
			err = os.WriteFile(cache, b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	edit(func(v *verdict) { v.Reason = "remembered" })
	if _, reason, err := DetectAccel(t.Context(), img, log); err != nil || reason != "remembered" {
		t.Errorf("not remembered: %q, %v", reason, err)
	}
	edit(func(v *verdict) { v.Boot = "another" })
	if again, reason, err := DetectAccel(t.Context(), img, log); err != nil || reason == "remembered" || again != first {
		t.Errorf("after a boot: %s, %q, %v", again, reason, err)
	}
}

func TestModuleOrder(t *testing.T) {
	img, _ := ForTest(t)
	debs, err := filepath.Glob(filepath.Join(filepath.Dir(filepath.Dir(img.Kernel)), "*.deb"))
	if err != nil || len(debs) == 0 {
		t.Fatal("no kernel package", err)
	}
	k, err := readKernel(t.Context(), debs[0])
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, m := range k.modules {
		names = append(names, m.file)
	}
	at := func(name string) int { return slices.Index(names, name) }
	if at("virtio.ko") < 0 || at("virtio.ko") > at("virtio_pci.ko") || at("failover.ko") > at("virtio_net.ko") {
		t.Errorf("order: %v", names)
	}
	if _, err := loadOrder(map[string]module{}, []string{"none"}); err == nil {
		t.Error("a module that is not there was found")
	}
}
