package local

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"

	"belay/agent/maint"
	"belay/migrate"
)

// put writes a file of a host's tree.
func put(t *testing.T, root, path, text string) {
	t.Helper()
	at := filepath.Join(root, path)
	if err := errors.Join(os.MkdirAll(filepath.Dir(at), 0o755), os.WriteFile(at, []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
}

// names lists a folder, "" when there is none.
func names(t *testing.T, dir string) string {
	t.Helper()
	all, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	var s []string
	for _, e := range all {
		s = append(s, e.Name())
	}
	return strings.Join(s, " ")
}

func disk(path string) maint.FileNeed {
	return maint.FileNeed{For: "disk vda", Path: path, Kind: maint.FileRegular, Same: true}
}

// pair is two hosts that share a folder, /srv of the one and /mnt of the other,
// and have one each.
func pair(t *testing.T) (a, b *Host, rootA, rootB string) {
	rootA, rootB = t.TempDir(), t.TempDir()
	shared := t.TempDir()
	for _, root := range []string{rootA, rootB} {
		if err := os.Symlink(shared, filepath.Join(root, "srv")); err != nil {
			t.Fatal(err)
		}
		put(t, root, "own/web-1.raw", "1234")
	}
	put(t, shared, "web-1.raw", "1234")
	return New(rootA, filepath.Join(rootA, "marks")), New(rootB, filepath.Join(rootB, "marks")), rootA, rootB
}

// TestMarks: only what is the same storage is taken for it, and nothing is left.
func TestMarks(t *testing.T) {
	t.Parallel()
	a, b, rootA, rootB := pair(t)
	needs, done := a.Mark(t.Context(), []maint.FileNeed{disk("/srv/web-1.raw"), disk("/own/web-1.raw"), disk("/srv/none"),
		{For: "cdrom sda", Path: "/own/web-1.raw", Kind: maint.FileRegular}})
	ground := b.Look(t.Context(), maint.Needs{Files: needs[:3]})
	if n := needs[0]; !maint.IsMark(n.Mark) || n.Inode == 0 || n.Bytes != 0 || !ground.Files[n.Path].Marked {
		t.Errorf("shared: %+v, %+v", n, ground.Files[n.Path])
	}
	if n := needs[1]; !maint.IsMark(n.Mark) || ground.Files[n.Path].Marked || ground.Files[n.Path].Inode == n.Inode {
		t.Errorf("each its own: %+v, %+v", n, ground.Files[n.Path])
	}
	if n := needs[2]; n.Mark != "" || n.Inode != 0 || ground.Files[n.Path] != (migrate.File{Known: true}) {
		t.Errorf("not there: %+v, %+v", n, ground.Files[n.Path])
	}
	if n := needs[3]; n.Mark != "" || n.Bytes != 4 {
		t.Errorf("only read: %+v", n)
	}
	if ps := migrate.CheckNeeds(maint.Needs{Files: needs[:2]}, "b", ground, maint.Supplies{}); len(ps) != 1 || ps[0].Code != maint.CodeDiskNotShared {
		t.Errorf("verdict: %+v", ps)
	}
	if got := names(t, filepath.Join(rootA, "srv")); got != needs[0].Mark+" web-1.raw" {
		t.Errorf("while it is marked, the folder has %s", got)
	}
	done()
	for _, dir := range []string{filepath.Join(rootA, "srv"), filepath.Join(rootA, "own"), filepath.Join(rootB, "own")} {
		if got := names(t, dir); got != "web-1.raw" {
			t.Errorf("%s is left with %s", dir, got)
		}
	}
	if got := names(t, filepath.Join(rootA, "marks")); got != "" {
		t.Errorf("records left: %s", got)
	}
}

// TestMarksOfAKilledBelayd: the next start removes them, and nothing else.
func TestMarksOfAKilledBelayd(t *testing.T) {
	t.Parallel()
	a, _, rootA, _ := pair(t)
	needs, _ := a.Mark(t.Context(), []maint.FileNeed{disk("/srv/web-1.raw"), disk("/own/web-1.raw")})
	// Somebody has put something into one of that name.
	put(t, rootA, "own/"+needs[1].Mark, "precious")
	put(t, rootA, "marks/notes", "of somebody else")

	again := New(rootA, filepath.Join(rootA, "marks"))
	left := again.Leftovers()
	if d := cmp.Diff([]string{needs[0].Mark}, left); d != "" {
		t.Fatal(d)
	}
	again.Sweep(t.Context(), left)
	again.Sweep(t.Context(), left)
	if got := names(t, filepath.Join(rootA, "srv")); got != "web-1.raw" {
		t.Errorf("left: %s", got)
	}
	if got := names(t, filepath.Join(rootA, "own")); got != needs[1].Mark+" web-1.raw" {
		t.Errorf("own has %s: a file with something in it is not to be removed", got)
	}
	if got := names(t, filepath.Join(rootA, "marks")); got != "notes" {
		t.Errorf("records: %s", got)
	}
	if got := New(rootA, filepath.Join(rootA, "no such folder")).Leftovers(); got != nil {
		t.Errorf("leftovers of nothing: %q", got)
	}
}

// TestNoMarks: without a record no mark is made, and inode numbers remain.
func TestNoMarks(t *testing.T) {
	t.Parallel()
	a, b, rootA, _ := pair(t)
	put(t, rootA, "marks", "a file where the folder should be")
	needs, done := a.Mark(t.Context(), []maint.FileNeed{disk("/srv/web-1.raw"), disk("/own/web-1.raw")})
	defer done()
	if needs[0].Mark+needs[1].Mark != "" || names(t, filepath.Join(rootA, "srv")) != "web-1.raw" {
		t.Fatalf("marked without a record: %+v", needs)
	}
	ps := migrate.CheckNeeds(maint.Needs{Files: needs}, "b", b.Look(t.Context(), maint.Needs{Files: needs}), maint.Supplies{})
	if len(ps) != 1 || !strings.Contains(ps[0].Reason, "/own/web-1.raw") {
		t.Errorf("verdict: %+v", ps)
	}
}

// TestStorageThatHangs: a look is given up in time, so is waiting for one's turn,
// and all goes on when the storage answers again.
func TestStorageThatHangs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := New(t.TempDir(), "")
		back := make(chan struct{})
		for range most {
			if _, ok := look(t.Context(), h, func() bool { <-back; return true }); ok {
				t.Fatal("a look at storage that hangs has a result")
			}
		}
		if v, ok := look(t.Context(), h, func() bool { return true }); v || ok {
			t.Error("there is no bound on looks that wait")
		}
		if g := h.Look(t.Context(), maint.Needs{Files: []maint.FileNeed{disk("/a")}}); g.Files["/a"] != (migrate.File{Hangs: true}) {
			t.Errorf("file: %+v", g.Files)
		}
		close(back)
		synctest.Wait()
		if v, ok := look(t.Context(), h, func() bool { return true }); !v || !ok {
			t.Error("the storage is back, and looks are not")
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, ok := look(ctx, h, func() bool { <-t.Context().Done(); return true }); ok {
			t.Error("a look goes on for a caller that has left")
		}
	})
}

func TestFiles(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	h := New(root, "")
	put(t, root, "srv/a.raw", "12345")
	if err := os.Symlink("a.raw", filepath.Join(root, "srv/link")); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(root, "srv/s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for path, want := range map[string]migrate.File{
		"/srv/a.raw":     {Known: true, Kind: maint.FileRegular, Bytes: 5},
		"/srv/link":      {Known: true, Kind: maint.FileRegular, Bytes: 5},
		"/srv":           {Known: true, Kind: maint.FileDir},
		"/srv/s":         {Known: true, Kind: maint.FileSocket},
		"/srv/none":      {Known: true},
		"/srv/a.raw/not": {Known: true},
	} {
		got := h.file(path, "").File
		if got.Inode != 0 != (want.Kind != "") {
			t.Errorf("%s: inode %d", path, got.Inode)
		}
		if got.Inode = 0; got != want {
			t.Errorf("%s: %+v, want %+v", path, got, want)
		}
	}
	if got := missing(os.ErrPermission).File; got != (migrate.File{}) {
		t.Errorf("what may not be looked at: %+v", got)
	}
	if got := h.socket("/srv/s"); got != (migrate.Socket{Folder: true, There: true}) {
		t.Errorf("socket: %+v", got)
	}
	if got := h.socket("/none/s"); got != (migrate.Socket{}) {
		t.Errorf("socket in no folder: %+v", got)
	}
}

func TestBlockDevices(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	h := New(root, "")
	for path, text := range map[string]string{
		"253:3/size": "2048\n", "253:3/dm/uuid": "LVM-abc\n",
		"259:1/size": "8\n", "259:1/wwid": "nvme.1\n",
		"8:300/size": "16\n", "8:300/device/wwid": "naa.5\n",
		"7:0/size": "32\n",
	} {
		put(t, root, "sys/dev/block/"+path, text)
	}
	for _, c := range []struct {
		rdev  uint64
		bytes uint64
		id    string
	}{
		{253<<8 | 3, 1 << 20, "LVM-abc"},
		{259<<8 | 1, 4096, "nvme.1"},
		{8<<8 | 300&0xff | 300>>8<<20, 8192, "naa.5"}, // minors beyond 255 are in two parts
		{7 << 8, 16384, ""},
		{9 << 8, 0, ""},
	} {
		if bytes, id := h.block(c.rdev); bytes != c.bytes || id != c.id {
			t.Errorf("%#x: %d bytes, %q; want %d, %q", c.rdev, bytes, id, c.bytes, c.id)
		}
	}
}

func TestLook(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	put(t, root, "sys/class/net/br0/flags", "0x1003\n")
	put(t, root, "sys/class/net/br0/bridge/forward_delay", "0\n")
	put(t, root, "sys/class/net/eth1/flags", "0x1002\n")
	put(t, root, "sys/bus/pci/devices/0000:3b:02.1/vendor", "0x8086\n")
	put(t, root, "usr/local/bin/swtpm", "")
	put(t, root, "run/x", "")
	put(t, root, "proc/meminfo", "MemTotal: 16 kB\nHugepagesize:       2048 kB\n")
	put(t, root, "proc/net/unix", "Num       RefCount Protocol Flags    Type St Inode Path\n"+
		"0000000000000000: 00000002 00000000 00010000 0001 01 20311 /run/my socket\n"+
		"0000000000000000: 00000003 00000000 00000000 0001 03 20312 /run/connected\n"+
		"0000000000000000: 00000003 00000000 00000000 0001 03 20313\n")
	put(t, root, "proc/net/tcp", "  sl  local_address rem_address   st\n"+
		"   0: 0100007F:170C 00000000:0000 0A 00000000:00000000\n"+
		"   1: 0100007F:0016 0200007F:1234 01 00000000:00000000\n"+
		"   2: zz:0016 0200007F:1234 0A\n")
	put(t, root, "proc/net/tcp6", "  sl  local_address\n"+
		"   0: 00000000000000000000000000000000:170D 00000000000000000000000000000000:0000 0A 0\n"+
		"   1: 0000000000000000FFFF00000100007F:170E 00000000000000000000000000000000:0000 0A 0\n")
	h := New(root, "")
	h.addresses = func() ([]net.Addr, error) {
		return []net.Addr{&net.IPNet{IP: net.IPv4(10, 0, 0, 1), Mask: net.CIDRMask(24, 32)}}, nil
	}
	got := h.Look(t.Context(), maint.Needs{
		Links:   []maint.LinkNeed{{Name: "br0"}, {Name: "eth1"}, {Name: "none"}},
		PCI:     []string{"0000:3b:02.1", "0000:3b:02.2"},
		Sockets: []maint.SocketNeed{{Path: "/run/my socket", Listen: true}, {Path: "/run/connected"}},
		Ports:   []maint.PortNeed{{}}, SwTPM: true})
	want := migrate.Ground{
		Files:     map[string]migrate.File{},
		Links:     map[string]migrate.Link{"br0": {Up: true, Bridge: true}, "eth1": {}},
		PCI:       map[string]bool{"0000:3b:02.1": true, "0000:3b:02.2": false},
		Sockets:   map[string]migrate.Socket{"/run/my socket": {Folder: true, Bound: true}, "/run/connected": {Folder: true}},
		Listening: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:5900"), netip.MustParseAddrPort("[::]:5901"), netip.MustParseAddrPort("127.0.0.1:5902")},
		Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")},
		SwTPM:     true,
	}
	if d := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); d != "" {
		t.Error(d)
	}
	if got := h.HugePageBytes(); got != 2<<20 {
		t.Errorf("huge pages of %d bytes", got)
	}
	if got := New(t.TempDir(), "").HugePageBytes(); got != 0 {
		t.Errorf("unknown huge pages of %d bytes", got)
	}
}
