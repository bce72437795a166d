package remote_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/patch/live"
	"belay/patch/live/livetest"
	"belay/patch/live/remote"
)

// judging is a machine that has livepatches judged as live.Direct does.
type judging struct{ *livetest.Machine }

func (j judging) Load(ctx context.Context, a live.Artifact) error {
	keys, err := live.ReadKeys(j.Keys)
	if err != nil {
		return err
	}
	if _, _, err := a.Check(keys); err != nil {
		return err
	}
	return j.Machine.Load(ctx, a)
}

// listen serves a host on a socket, as systemd and belay-kernel would.
func listen(t *testing.T, h remote.Host) *remote.Client {
	t.Helper()
	return listenTo(t, h, func(*net.UnixConn) {})
}

// listenTo tells of each connection.
func listenTo(t *testing.T, h remote.Host, accepted func(*net.UnixConn)) *remote.Client {
	t.Helper()
	dir, err := os.MkdirTemp("", "kernel")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			accepted(conn)
			go remote.Serve(context.Background(), conn, h, func(string, error) {}, uint32(os.Getuid()))
		}
	}()
	return &remote.Client{Socket: l.Addr().String()}
}

// TestContract: whoever asks belay-kernel finds what is relied on.
func TestContract(t *testing.T) {
	t.Parallel()
	m := livetest.New(t, t.TempDir(), livetest.Newer())
	v := livetest.NewVendor(t)
	v.Trust(m.Keys)
	livetest.Contract(t, livetest.Subject{Tree: m.Tree, Kernel: listen(t, judging{m}), Wait: 10 * time.Second,
		A: v.Make("fix_a", m.Release, m.Version, nil), B: v.Make("fix_b", m.Release, m.Version, nil),
		Other: v.Make("fix_c", "5.10.0", m.Version, nil), Hold: func() (live.Artifact, func()) {
			m.Hold(120, "worker_thread")
			return v.Make("fix_d", m.Release, m.Version, nil), func() { m.LetGo(120) }
		}})
}

// programs is a machine on which QEMUs can be patched as well.
type programs struct {
	*livetest.Machine
	live.UserSpace
}

// TestUserContract: whoever has belay-kernel patch QEMUs finds what is relied on.
func TestUserContract(t *testing.T) {
	t.Parallel()
	m := livetest.New(t, t.TempDir(), livetest.Newer())
	v, p := livetest.NewVendor(t), livetest.NewPrograms(m.Keys)
	v.Trust(m.Keys)
	const build, other = "0123456789abcdef0123456789abcdef01234567", "fedcba9876543210fedcba9876543210fedcba98"
	livetest.UserContract(t, livetest.UserSubject{UserSpace: listen(t, programs{m, p}), QEMU: p.Run("web-1", build), Stock: p.Run("web-2"),
		Fits: v.Container("fix", build), Other: v.Container("other", other), Foreign: livetest.NewVendor(t).Container("fix", build),
		End: func() { p.End("web-1") }})
	if err := listen(t, m).Patchable(t.Context(), live.QEMU{Guest: "web-2"}, v.Container("fix", build)); !errors.Is(err, unix.ENOSYS) {
		t.Errorf("where none can be patched: %v", err)
	}
}

func TestWitness(t *testing.T) {
	t.Parallel()
	m := livetest.New(t, t.TempDir(), livetest.Newer())
	c := listen(t, m)
	m.Hold(120, "meminfo_proc_show")
	tasks, err := c.Tasks(t.Context(), []string{"vmlinux/meminfo_proc_show"})
	if err != nil || len(tasks) != 1 || tasks[0].TID != 120 || !tasks[0].Kernel || tasks[0].Function != "meminfo_proc_show" {
		t.Errorf("%+v, %v", tasks, err)
	}
	m.Say("BUG: unable to handle page fault")
	lines, err := c.KernelLog(t.Context(), 0)
	if err != nil || len(lines) < 2 || !lines[len(lines)-1].Alarm() {
		t.Errorf("%+v, %v", lines, err)
	}
	if end, err := c.LogEnd(t.Context()); err != nil || end == 0 || end != lines[len(lines)-1].Seq {
		t.Errorf("the log ends with %d, %v", end, err)
	}
	before, _ := m.Tree.Microcode()
	if err := c.ReloadMicrocode(t.Context()); err != nil {
		t.Fatal(err)
	}
	if after, _ := m.Tree.Microcode(); len(after) != 4 || after[3] == before[3] {
		t.Errorf("%v, then %v", before, after)
	}
}

// TestProblemsTravel: what belay-kernel finds wrong is what its asker is told.
func TestProblemsTravel(t *testing.T) {
	t.Parallel()
	m := livetest.New(t, t.TempDir(), livetest.Debian12())
	livetest.NewVendor(t).Trust(m.Keys)
	c := listen(t, judging{m})
	var p *maint.Problem
	if err := c.Load(t.Context(), livetest.NewVendor(t).Make("fix_a", m.Release, m.Version, nil)); !errors.As(err, &p) || p.Code != maint.CodePatchSigned || p.Remedy == "" {
		t.Errorf("%v", err)
	}
	if err := c.ReloadMicrocode(t.Context()); !errors.Is(err, unix.ENOENT) {
		t.Errorf("%v", err)
	}
	if err := (&remote.Client{Socket: "/nonexistent"}).Unload(t.Context(), "a"); !errors.As(err, &p) || p.Code != maint.CodeNoHelper {
		t.Errorf("%v", err)
	}
}

// TestBadRequests: whatever comes, there is an answer, and nothing is done.
func TestBadRequests(t *testing.T) {
	t.Parallel()
	m := livetest.New(t, t.TempDir(), livetest.Debian12())
	c := listen(t, m)
	for name, text := range map[string]string{
		"not JSON":        "load please\n",
		"unknown action":  `{"do":"reboot"}` + "\n",
		"unknown field":   `{"do":"tasks","force":true}` + "\n",
		"load of no file": `{"do":"load","manifest":""}` + "\n",
		"patch no QEMU":   `{"do":"qemu-patch","qemu":{"guest":"web-1","pid":1}}` + "\n",
		"cut":             `{"do":"tas`,
		"too long":        `{"do":"tasks","name":"` + strings.Repeat("a", 5<<20) + `"}` + "\n",
	} {
		conn, err := net.Dial("unix", c.Socket)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = conn.Write([]byte(text)) // it may have enough before the end
		_ = conn.(*net.UnixConn).CloseWrite()
		line, _ := bufio.NewReader(conn).ReadString('\n')
		var a struct{ Error string }
		if err := json.Unmarshal([]byte(line), &a); (err != nil || a.Error == "") && name != "too long" {
			t.Errorf("%s: the answer is %q", name, line)
		}
		conn.Close()
	}
	if m.Loaded() != "" {
		t.Errorf("loaded %q", m.Loaded())
	}
}

// TestTwoFiles: a load has one.
func TestTwoFiles(t *testing.T) {
	t.Parallel()
	m := livetest.New(t, t.TempDir(), livetest.Debian12())
	c := listen(t, m)
	conn, err := net.Dial("unix", c.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, _, err := conn.(*net.UnixConn).WriteMsgUnix([]byte(`{"do":"load"}`+"\n"), unix.UnixRights(0, 1), nil); err != nil {
		t.Fatal(err)
	}
	line, _ := bufio.NewReader(conn).ReadString('\n')
	if !strings.Contains(line, "more than one file") {
		t.Errorf("the answer is %q", line)
	}
}

// TestConnectionIsKept: of one belay-kernel several things are asked; when it has ended, another.
func TestConnectionIsKept(t *testing.T) {
	t.Parallel()
	m := livetest.New(t, t.TempDir(), livetest.Debian12())
	conns := make(chan *net.UnixConn, 8)
	c := listenTo(t, m, func(conn *net.UnixConn) { conns <- conn })
	for range 3 {
		if _, err := c.Tasks(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(conns); n != 1 {
		t.Errorf("for three requests in a row %d connections are made", n)
	}
	(<-conns).Close()
	var errno unix.Errno
	if err := c.Unload(t.Context(), "none"); !errors.As(err, &errno) {
		t.Errorf("after belay-kernel has ended: %v", err)
	}
	if n := len(conns); n != 1 {
		t.Errorf("%d connections are made after that", n)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Tasks(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("what nobody waits for gives %v", err)
	}
	if _, err := c.Tasks(t.Context(), nil); err != nil {
		t.Errorf("after that: %v", err)
	}
}

// TestStoppedHelper: a belay-kernel that does not answer any more keeps nobody waiting.
func TestStoppedHelper(t *testing.T) {
	t.Parallel()
	m := livetest.New(t, t.TempDir(), livetest.Debian12())
	next := listen(t, m)
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	c := &remote.Client{Socket: filepath.Join(dir, "s")}
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		t.Cleanup(func() { conn.Close() })
		_, _ = bufio.NewReader(conn).ReadString('\n')
		_, _ = conn.Write([]byte("{}\n")) // and nothing more, whatever comes
	}()
	if _, err := c.Tasks(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	l.Close()
	if err := os.Symlink(next.Socket, c.Socket); err != nil { // closing has removed it
		t.Fatal(err)
	}
	m.Hold(120, "meminfo_proc_show")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if tasks, err := c.Tasks(ctx, []string{"vmlinux/meminfo_proc_show"}); err != nil || len(tasks) != 1 {
		t.Errorf("%+v, %v", tasks, err)
	}
}

// TestGivenUp: what its asker does not wait for any more is not begun.
func TestGivenUp(t *testing.T) {
	t.Parallel()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	here, there := conn(t, fds[0]), conn(t, fds[1])
	if _, err := here.Write([]byte(`{"do":"unload","name":"a"}` + "\n")); err != nil {
		t.Fatal(err)
	}
	here.Close()
	h, told := new(asked), ""
	remote.Serve(t.Context(), there, h, func(asked string, err error) { told = asked + ": " + err.Error() }, uint32(os.Getuid()))
	if len(h.did) > 0 || !strings.Contains(told, "unload a: ") {
		t.Errorf("done: %v; told: %q", h.did, told)
	}
}
