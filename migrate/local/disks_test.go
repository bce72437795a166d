package local

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/migrate"
)

func raw(path string) maint.DiskCopy {
	return maint.DiskCopy{Target: "vda", Path: path, Format: "raw", Bytes: 1 << 20}
}

// made makes a disk and puts it in its place.
func made(t *testing.T, h *Host, d maint.DiskCopy) maint.MadeFile {
	t.Helper()
	f, err := h.MakeDisk(t.Context(), PlanDisk(d))
	if err != nil {
		t.Fatal(err)
	}
	if err := h.PlaceDisk(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	return f
}

func TestMakeDisk(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	put(t, root, "d/other", "")
	h := New(root, filepath.Join(root, "marks"))
	f, err := h.MakeDisk(t.Context(), PlanDisk(raw("/d/web.raw")))
	if err != nil {
		t.Fatal(err)
	}
	if got := names(t, filepath.Join(root, "d")); got != filepath.Base(f.Temp)+" other" || h.IsMade(t.Context(), f) {
		t.Errorf("made, not in its place: %q", got)
	}
	if err := h.PlaceDisk(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(filepath.Join(root, "d/web.raw"))
	if err != nil || info.Size() != 1<<20 || info.Mode().Perm() != 0o600 || !h.IsMade(t.Context(), f) {
		t.Errorf("%v, %v", info, err)
	}
	if got := names(t, filepath.Join(root, "d")); got != "other web.raw" {
		t.Errorf("in its place: %q", got)
	}
	for range 2 { // the second finds nothing
		if err := h.RemoveDisk(t.Context(), f); err != nil {
			t.Fatal(err)
		}
	}
	if got := names(t, filepath.Join(root, "d")); got != "other" {
		t.Errorf("removed: %q", got)
	}
}

func TestMakeDiskOfQcow2(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("needs qemu-img")
	}
	dir := t.TempDir() // qemu-img reads what is below at its path: no root
	h := New("", filepath.Join(dir, "marks"))
	put(t, dir, "base, with a comma.raw", string(make([]byte, 1<<20)))
	d := maint.DiskCopy{Target: "vda", Path: filepath.Join(dir, "web:1.qcow2"), Format: "qcow2", Bytes: 3 << 20,
		Backing: filepath.Join(dir, "base, with a comma.raw"), BackingFormat: "raw"}
	made(t, h, d)
	out, err := exec.Command("qemu-img", "compare", "-f", "qcow2", "-F", "raw", d.Path, d.Backing).CombinedOutput()
	if err != nil || string(out) == "" {
		t.Errorf("%v: %s", err, out)
	}
	d.Path, d.Format = filepath.Join(dir, "none", "web"), "qcow2"
	if _, err := h.MakeDisk(t.Context(), PlanDisk(d)); err == nil {
		t.Error("made in no folder")
	}
}

// What is at the path is never taken for what was made, whatever it is.
func TestDiskInTheWay(t *testing.T) {
	t.Parallel()
	for name, put := range map[string]func(string) error{
		"file":          func(path string) error { return os.WriteFile(path, []byte("precious"), 0o600) },
		"folder":        func(path string) error { return os.Mkdir(path, 0o700) },
		"dangling link": func(path string) error { return os.Symlink("nowhere", path) },
	} {
		root := t.TempDir()
		h := New(root, filepath.Join(root, "marks"))
		path := filepath.Join(root, "web.raw")
		f, err := h.MakeDisk(t.Context(), PlanDisk(raw("/web.raw")))
		if err := errors.Join(err, put(path)); err != nil {
			t.Fatal(err)
		}
		before, _ := os.Lstat(path)
		if err := h.PlaceDisk(t.Context(), f); !errors.Is(err, ErrInTheWay) {
			t.Errorf("%s: %v", name, err)
		}
		if err := h.RemoveDisk(t.Context(), f); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		after, err := os.Lstat(path)
		if err != nil || !os.SameFile(before, after) || before.Size() != after.Size() {
			t.Errorf("%s: %v, %v", name, after, err)
		}
		if got := names(t, root); got != "web.raw" {
			t.Errorf("%s: %q is left", name, got)
		}
	}
}

// A disk that was replaced by another file is left alone, also where that has the number
// of the old one's inode.
func TestDiskReplaced(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	h := New(root, filepath.Join(root, "marks"))
	f := made(t, h, raw("/web.raw"))
	path := filepath.Join(root, "web.raw")
	if err := errors.Join(os.Remove(path), os.WriteFile(path, []byte("precious"), 0o600)); err != nil {
		t.Fatal(err)
	}
	id, err := identify(path)
	if err != nil {
		t.Fatal(err)
	}
	f.Device, f.Inode = id.device, id.inode
	if id.born == 0 {
		t.Skip("this file system does not say when a file was born")
	}
	if err := h.RemoveDisk(t.Context(), f); err != nil {
		t.Error(err)
	}
	if got := names(t, root); got != "web.raw" {
		t.Errorf("%q", got)
	}
}

// A file that a process has open and locked, as QEMU does, is not removed.
func TestDiskInUse(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	h := New(root, filepath.Join(root, "marks"))
	f := made(t, h, raw("/web.raw"))
	file, err := os.OpenFile(filepath.Join(root, "web.raw"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	lock := unix.Flock_t{Type: unix.F_RDLCK, Start: 201, Len: 1} // QEMU's, of one who writes
	if err := unix.FcntlFlock(file.Fd(), unix.F_OFD_SETLK, &lock); err != nil {
		t.Fatal(err)
	}
	if err := h.RemoveDisk(t.Context(), f); !errors.Is(err, ErrInUse) || names(t, root) != "web.raw" {
		t.Errorf("%v, %q", err, names(t, root))
	}
	if err := errors.Join(file.Close(), h.RemoveDisk(t.Context(), f)); err != nil || names(t, root) != "" {
		t.Errorf("%v, %q", err, names(t, root))
	}
}

func TestPlaces(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	put(t, root, "d/there.raw", "1234")
	h := New(root, filepath.Join(root, "marks"))
	all := h.Places(t.Context(), []maint.DiskCopy{raw("/d/new.raw"), raw("/d/there.raw"), raw("/none/new.raw"), raw("/d/there.raw/new.raw")})
	if p := all["/d/new.raw"]; !p.Known || !p.Folder || p.Denied || p.There || p.Free == 0 || p.Storage == 0 {
		t.Errorf("a new one: %+v", p)
	}
	if p := all["/d/there.raw"]; !p.There || p.Taken == 0 {
		t.Errorf("one that is there: %+v", p)
	}
	for _, path := range []string{"/none/new.raw", "/d/there.raw/new.raw"} {
		if p := all[path]; p != (migrate.DiskPlace{Known: true}) {
			t.Errorf("%s: %+v", path, p)
		}
	}
}

// An image that storage is slow to make is not held to be removed before it is there: it
// would be nobody's.
func TestRemoveWhatIsBeingMade(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	put(t, root, "d/other", "")
	h := New(root, filepath.Join(root, "marks"))
	h.wait = 10 * time.Millisecond
	answers := make(chan struct{})
	h.create = func(ctx context.Context, path string, d maint.DiskCopy) error {
		<-answers
		return create(context.WithoutCancel(ctx), path, d)
	}
	f := PlanDisk(raw("/d/web.raw"))
	if _, err := h.MakeDisk(t.Context(), f); !errors.Is(err, errHangs) {
		t.Fatalf("made on storage that hangs: %v", err)
	}
	if err := h.RemoveDisk(t.Context(), f); !errors.Is(err, errHangs) {
		t.Fatalf("what is being made is removed: %v", err)
	}
	close(answers)
	h.wait = patience
	for {
		err := h.RemoveDisk(t.Context(), f)
		if err == nil {
			break
		}
		if !errors.Is(err, errHangs) {
			t.Fatal(err)
		}
		select {
		case <-time.After(time.Millisecond):
		case <-t.Context().Done():
			t.Fatal("it is never made")
		}
	}
	if got := names(t, filepath.Join(root, "d")); got != "other" {
		t.Errorf("there is left %q", got)
	}
}
