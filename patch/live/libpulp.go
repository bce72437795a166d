package live

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/boottime"
	"belay/agent/maint"
	"belay/patch/internal/linux"
)

// Libpulp is ulp(1). It patches libraries that were built for it, in processes that were
// started with libpulp.so preloaded; a stock QEMU is neither.
//
// ulp stops all threads of a process, has one of them run libpulp's code, and puts its
// registers right. Who kills ulp between the two kills the process. So it is never killed: it
// ignores the signals that come with the end of who started it, writes to a file, which is
// never full or closed as a pipe is, and keeps a lock for as long as it runs. Whoever comes
// after a belay-kernel that has died waits for that lock, and reads the file.
//
// It judges every artifact itself, whoever has judged it before, and touches no process but
// guests' QEMUs. It wants CAP_SYS_PTRACE, and for what a process has mapped CAP_SYS_ADMIN.
type Libpulp struct {
	Tree Tree
	Keys string // the folder of the keys that are trusted
	// Dir is for the containers, which QEMU must be able to map, and what ulp says. It
	// must be root's alone to write.
	Dir string
	// Program is ulp; "": it is looked for in PATH.
	Program string
}

// DefaultContainers is where QEMU finds containers.
const DefaultContainers = "/var/lib/belay-ulp"

var _ UserSpace = Libpulp{}

func (l Libpulp) program() (string, error) { return exec.LookPath(cmp.Or(l.Program, "ulp")) }

const noUlp = "ulp(1), libpulp's tool, is not installed"

// Ready says why no livepatch at all can be applied to a process; "": some could.
func (l Libpulp) Ready(pid int) string {
	if _, err := l.program(); err != nil {
		return noUlp
	}
	maps, err := os.ReadFile(l.Tree.path("proc", strconv.Itoa(pid), "maps"))
	if err != nil {
		return "its process cannot be told: " + err.Error()
	}
	if !strings.Contains(string(maps), "/libpulp.so") {
		return "it was not started with libpulp.so preloaded"
	}
	return ""
}

// Patchable implements UserSpace.
func (l Libpulp) Patchable(ctx context.Context, q QEMU, a Artifact) error {
	t, err := l.take(ctx, q, a)
	if err != nil {
		return err
	}
	defer t.leave()
	return t.fits()
}

// Applied implements UserSpace.
func (l Libpulp) Applied(ctx context.Context, q QEMU, a Artifact) (bool, error) {
	t, err := l.take(ctx, q, a)
	if err != nil {
		return false, err
	}
	defer t.leave()
	if err := t.fits(); err != nil {
		return false, err
	}
	// A libpulp that is out of order says of everything that it is not applied.
	if r, err := t.ulp("patches", "patches", "-p", strconv.Itoa(q.PID)); err != nil {
		return false, err
	} else if !strings.Contains(r.text, "Livepatching status: enabled") {
		return false, t.refused(r, "libpulp in it is not in order")
	}
	r, err := t.ulp("check", "check", "-p", strconv.Itoa(q.PID), t.file)
	switch {
	case err != nil:
		return false, err
	case r.code == 1 && strings.Contains(r.text, "patch already applied"):
		return true, nil
	case r.code == 0 && strings.Contains(r.text, "patch not yet applied"):
		return false, nil
	}
	return false, t.refused(r, "whether it has the livepatch cannot be told")
}

// What ulp is told: how often it tries again when the process is in malloc or dlopen, 1 ms
// apart, and after how many seconds in it it gives up, which the process does not survive.
const (
	ulpRetries = "50"
	ulpTimeout = "100"
)

// Set implements UserSpace.
func (l Libpulp) Set(ctx context.Context, q QEMU, a Artifact, on bool) (time.Duration, error) {
	t, err := l.take(ctx, q, a)
	if err != nil {
		return 0, err
	}
	defer t.leave()
	if err := t.fits(); err != nil {
		return 0, err
	}
	if err := t.stoppable(ctx); err != nil {
		return 0, err
	}
	args := []string{"trigger", "-p", strconv.Itoa(q.PID), "--retries", ulpRetries, "--timeout", ulpTimeout}
	if !on {
		args = append(args, "--revert")
	}
	r, err := t.ulp("trigger", append(args, t.file)...)
	if err != nil {
		return r.took, err
	}
	// Its exit code is 0 too when it has done nothing.
	if r.code != 0 || !strings.Contains(r.text, "Processes patched: 1,") {
		return r.took, t.refused(r, "ulp has not patched it")
	}
	return r.took, nil
}

// turn is a process's turn: ulp is at work on no other, nor is anybody else at this one.
type turn struct {
	Libpulp
	q     QEMU
	m     UserManifest
	bin   string   // ulp
	lock  *os.File // on all that Dir is for
	pidfd int
	file  string // the container, as QEMU finds it
}

// take judges the artifact and the process, waits for an ulp that an earlier one has left at
// work, and puts the container where QEMU finds it.
func (l Libpulp) take(ctx context.Context, q QEMU, a Artifact) (_ *turn, err error) {
	t := &turn{Libpulp: l, q: q, pidfd: -1}
	keys, err := ReadKeys(l.Keys)
	if err != nil {
		return nil, err
	}
	if t.m, err = a.CheckContainer(keys); err != nil {
		return nil, err
	}
	if t.bin, err = l.program(); err != nil {
		return nil, QEMUVerdict(q.Guest, noUlp)
	}
	if err := errors.Join(os.MkdirAll(l.Dir, 0o755), os.Chmod(l.Dir, 0o755)); err != nil {
		return nil, err
	}
	folder, err := linux.OpenTrusted(l.Dir)
	if err != nil {
		return nil, err
	}
	defer folder.Close()
	if t.lock, err = lockFile(ctx, filepath.Join(l.Dir, "lock")); err != nil {
		return nil, maint.Problemf(maint.CodeBusy, "libpulp", "wait for it, and never kill it: that would end a QEMU (ps -C ulp)", "ulp is at work: %v", err)
	}
	defer func() {
		if err != nil {
			t.leave()
		}
	}()
	if t.pidfd, err = unix.PidfdOpen(q.PID, 0); err != nil {
		return nil, fmt.Errorf("process %d of guest %s: %w", q.PID, q.Guest, unix.ESRCH)
	}
	if err := t.same(); err != nil {
		return nil, err
	}
	if err := t.past(); err != nil {
		return nil, err
	}
	t.file = filepath.Join(l.Dir, t.m.Name+"-"+t.m.SHA256+containerExt)
	return t, t.provide(a.Module)
}

// provide puts the container where QEMU, which is another user, can read it.
func (t *turn) provide(container []byte) error {
	if b, err := linux.ReadFile(t.file, maxModule); err == nil && bytes.Equal(b, container) {
		return nil
	}
	return errors.Join(linux.WriteFile(t.file, container), os.Chmod(t.file, 0o644))
}

func (t *turn) leave() {
	if t.pidfd >= 0 {
		unix.Close(t.pidfd)
	}
	t.lock.Close()
}

// lockFile waits until nobody has the lock. It is passed on to ulp, and so lasts as long as
// that.
func lockFile(ctx context.Context, name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	got := make(chan error, 1)
	go func() {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX)
		for errors.Is(err, unix.EINTR) {
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		}
		got <- err
	}()
	select {
	case err = <-got:
		if err != nil {
			f.Close()
		}
		return f, err
	case <-ctx.Done():
		go func() { <-got; f.Close() }()
		return nil, ctx.Err()
	}
}

// programs are those that libvirt runs guests in.
var programs = regexp.MustCompile(`^(qemu-system-[a-z0-9_]+|qemu-kvm|kvm)$`)

// same judges whether the process is the guest's QEMU, and still the one that is meant.
func (t *turn) same() error {
	now, err := t.Tree.Process(t.q.Guest)
	if err == nil && now != t.q {
		err = unix.ESRCH
	}
	if err != nil {
		return fmt.Errorf("process %d is guest %s's QEMU no more: %w", t.q.PID, t.q.Guest, err)
	}
	exe, err := os.Readlink(t.proc("exe"))
	if name := filepath.Base(strings.TrimSuffix(exe, deleted)); err != nil || !programs.MatchString(name) {
		return maint.Problemf(maint.CodeQEMURefused, "guest "+t.q.Guest, "", "its process %d is no QEMU: it runs %q", t.q.PID, exe)
	}
	return nil
}

// deleted is what the kernel adds to the path of a file that has gone from it.
const deleted = " (deleted)"

func (t *turn) proc(elem ...string) string {
	return t.Tree.path(append([]string{"proc", strconv.Itoa(t.q.PID)}, elem...)...)
}

// record is the first line of what is kept of ulp's work at a process, before that begins.
type record struct {
	QEMU
	Boot string `json:"boot"`
	Do   string `json:"do"`
}

func (t *turn) recordFile() string { return filepath.Join(t.Dir, strconv.Itoa(t.q.PID)+".log") }

// past is an error if the process may have been left inconsistent, by whomever it was told.
func (t *turn) past() error {
	b, err := linux.ReadFile(t.recordFile(), maxManifest)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	head, text, _ := strings.Cut(string(b), "\n")
	var r record
	boot, _ := boottime.ID()
	if json.Unmarshal([]byte(head), &r) != nil || r.QEMU != t.q || r.Boot != boot {
		return nil // of another process
	}
	return t.judge(said(r.Do, text))
}

// answer is what ulp has said.
type answer struct {
	do   string
	text string
	code int // -1: it did not get as far
	took time.Duration
}

// exitLine is what is written after what ulp says.
const exitLine = "\nexit "

func said(do, text string) answer {
	r := answer{do: do, text: text, code: -1}
	if i := strings.LastIndex("\n"+text, exitLine); i >= 0 {
		if code, err := strconv.Atoi(strings.TrimSpace(text[i+len(exitLine)-1:])); err == nil {
			r.text, r.code = strings.TrimSpace(text[:i]), code
		}
	}
	return r
}

// fatal reports whether the process may be inconsistent. ulp says so in words, not always by
// its code; its check ends with 255 for anything. One that was killed was so in the middle.
func (r answer) fatal() bool {
	return strings.Contains(r.text, "INCONSISTENT STATE") || r.code > 128 && r.code < 255 || r.code == 255 && r.do == "trigger"
}

func (t *turn) judge(r answer) error {
	if !r.fatal() {
		return nil
	}
	guest := maint.ShellWord(t.q.Guest)
	return maint.Problemf(maint.CodeQEMUUnsure, "guest "+t.q.Guest,
		fmt.Sprintf("have the guest leave this process: belay migrate %s --to PEER, or belay replace-vmm %s --method copy; nothing else is done to it", guest, guest),
		"its QEMU (process %d) may have been left in an inconsistent state by ulp %s: %s", t.q.PID, r.do, r.short())
}

// short is what ulp says, for one line.
func (r answer) short() string {
	s := strings.Join(strings.Fields(r.text), " ")
	if len(s) > 400 {
		s = "... " + s[len(s)-400:]
	}
	return fmt.Sprintf("exit code %d, %q", r.code, s)
}

func (t *turn) refused(r answer, what string) error {
	remedy := fmt.Sprintf("see 'ulp messages -p %d'; else use rung B2 (belay replace-vmm %s)", t.q.PID, maint.ShellWord(t.q.Guest))
	if strings.Contains(r.text, "Failure in dlopen") {
		remedy = fmt.Sprintf("let QEMU map %s: AppArmor or SELinux may keep it from that (docs/rung-a-hot-patch.md)", t.file)
	}
	return maint.Problemf(maint.CodeQEMURefused, "guest "+t.q.Guest, remedy, "%s: ulp %s: %s", what, r.do, r.short())
}

// script has ulp outlive who has started it, and its exit code be kept.
const script = `trap '' HUP INT QUIT PIPE TERM; "$@"; code=$?; echo; echo "exit $code"`

// ulp runs it to its end, whatever becomes of who asks.
func (t *turn) ulp(do string, args ...string) (r answer, err error) {
	boot, err := boottime.ID()
	if err != nil {
		return r, err
	}
	head, err := json.Marshal(record{t.q, boot, do})
	if err != nil {
		return r, err
	}
	log, err := os.OpenFile(t.recordFile(), os.O_CREATE|os.O_TRUNC|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return r, err
	}
	defer log.Close()
	if _, err := fmt.Fprintf(log, "%s\n", head); err != nil {
		return r, err
	}
	c := exec.Command("/bin/sh", append([]string{"-c", script, "sh", t.bin}, args...)...) //nolint:gosec // nothing of it is from elsewhere
	c.Dir, c.Env, c.Stdout, c.Stderr = "/", append(os.Environ(), "LC_ALL=C"), log, log
	c.ExtraFiles, c.SysProcAttr = []*os.File{t.lock}, &syscall.SysProcAttr{Setsid: true}
	begun := time.Now()
	runErr := c.Run()
	took := time.Since(begun)
	b, err := linux.ReadAll(log, maxManifest)
	if err != nil {
		return r, err
	}
	_, text, _ := strings.Cut(string(b), "\n")
	r = said(do, text)
	if r.took = took; r.code < 0 {
		return r, fmt.Errorf("ulp %s has no end: %v: %s", do, runErr, r.short())
	}
	if err := t.judge(r); err != nil {
		return r, err
	}
	if t.ended() {
		return r, maint.Problemf(maint.CodeQEMUUnsure, "guest "+t.q.Guest, "see its log in /var/log/libvirt/qemu, and start it again",
			"its QEMU (process %d) has ended while ulp %s was at work on it: %s", t.q.PID, do, r.short())
	}
	return r, nil
}

// ended reports whether the process has.
func (t *turn) ended() bool {
	fds := []unix.PollFd{{Fd: int32(t.pidfd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n > 0
}
