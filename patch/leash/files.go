package leash

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/boottime"
	"belay/agent/maint"
	"belay/patch/internal/linux"
)

// A leash of operation OP has three files: OP.json, its notes; OP.sock, where it
// listens; OP.lock, locked while it lives.
const (
	notesExt  = ".json"
	socketExt = ".sock"
	lockExt   = ".lock"
	newExt    = ".new" // of notes that are being written
)

// files are the extensions of all that can be left of a leash. The lock is the
// last: see claim.
var files = [...]string{notesExt + newExt, notesExt, socketExt, lockExt}

func path(dir string, op maint.OpID, ext string) string { return filepath.Join(dir, string(op)+ext) }

// readNotes reads an operation's notes; fs.ErrNotExist when there are none.
func readNotes(dir string, op maint.OpID) (*Status, error) {
	name := path(dir, op, notesExt)
	b, err := linux.ReadFile(name, maxReply)
	if err != nil {
		return nil, fmt.Errorf("cannot read the leash's notes: %w", err)
	}
	var s Status
	if err := json.Unmarshal(b, &s); err != nil || s.Op != op {
		return nil, fmt.Errorf("cannot read the leash's notes: %s %w", name, errors.Join(errDamaged, err))
	}
	return &s, nil
}

// errDamaged: the notes were read, and nothing can be made of them.
var errDamaged = errors.New("is damaged")

// write replaces the notes in one step. It does not sync: see the package
// comment. The folder is made anew if somebody has removed it.
func (s *Status) write(dir string) error {
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	name := path(dir, s.Op, notesExt)
	err = os.WriteFile(name+newExt, b, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		if err = makeDir(dir); err == nil {
			err = os.WriteFile(name+newExt, b, 0o600)
		}
	}
	if err == nil {
		err = os.Rename(name+newExt, name)
	}
	if err != nil {
		return fmt.Errorf("cannot write the leash's notes: %w", err)
	}
	return nil
}

// remove removes all files of an operation.
func remove(dir string, op maint.OpID) error {
	var errs []error
	for _, ext := range files {
		if err := os.Remove(path(dir, op, ext)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// makeDir makes the leashes' folder, which nobody but its owner may enter.
func makeDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !info.IsDir():
		return fmt.Errorf("%s is no folder", dir)
	case !ok || int(st.Uid) != os.Geteuid() || info.Mode().Perm()&0o077 != 0:
		return fmt.Errorf("%s can be entered by others than its owner (chown it to root and chmod it to 0700)", dir)
	}
	return nil
}

// inRAM reports whether the folder's file system needs no disk.
func inRAM(dir string) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && (st.Type == unix.TMPFS_MAGIC || st.Type == unix.RAMFS_MAGIC)
}

// errClaimed is that of a leash whose operation has one already.
var errClaimed = errors.New("this operation has a leash already")

// claim takes the operation's lock, which lasts as long as the file is open:
// there is never more than one leash for an operation.
func claim(dir string, op maint.OpID) (*os.File, error) {
	name := path(dir, op, lockExt)
	for {
		f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return nil, err
		}
		whole := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET}
		if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &whole); err != nil {
			f.Close()
			if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
				return nil, errClaimed
			}
			return nil, err
		}
		// A leash that was disarmed may have removed the file meanwhile,
		// and a lock on a removed file keeps nobody away.
		ours, err1 := f.Stat()
		there, err2 := os.Stat(name)
		if err1 == nil && err2 == nil && os.SameFile(ours, there) {
			return f, nil
		}
		f.Close()
	}
}

// alive reports whether the operation's leash lives, without getting in the way
// of one that is about to.
func alive(dir string, op maint.OpID) (bool, error) {
	f, err := os.OpenFile(path(dir, op, lockExt), os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	whole := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &whole); err != nil {
		return false, err
	}
	return whole.Type != unix.F_UNLCK, nil
}

// claimWait is how long a leash that was started waits for one that is ending.
const claimWait = time.Second

// Listen claims an operation for this process and opens its socket. close gives
// both back; it leaves the notes.
func Listen(dir string, op maint.OpID) (l net.Listener, close func(), err error) {
	fail := func(err error) (net.Listener, func(), error) {
		return nil, nil, fmt.Errorf("cannot be the leash of %s: %w", op, err)
	}
	if err := checkOp(op); err != nil {
		return fail(err)
	}
	if err := makeDir(dir); err != nil {
		return fail(err)
	}
	var lock *os.File
	for end := boottime.Now() + claimWait; ; time.Sleep(10 * time.Millisecond) {
		lock, err = claim(dir, op)
		if err == nil {
			break
		}
		if !errors.Is(err, errClaimed) || boottime.Now() > end {
			return fail(err)
		}
	}
	name := path(dir, op, socketExt)
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		lock.Close()
		return fail(err)
	}
	socket, err := net.ListenUnix("unix", &net.UnixAddr{Name: name, Net: "unix"}) // the folder keeps others out
	if err != nil {
		lock.Close()
		return fail(err)
	}
	// When it is closed the name may be that of the next leash's already.
	socket.SetUnlinkOnClose(false)
	l = socket
	return l, func() { l.Close(); lock.Close() }, nil
}

// Leftover is what a leash has left behind.
type Leftover struct {
	Status
	// Alive: its process is there; take it up with Client.Attach.
	Alive bool
	// Void: it is of an earlier boot, which its guests have not survived.
	Void bool
}

// Leftovers are the orders whose notes are in the folder: those of living
// leashes and of dead ones, of this boot and of others. Notes that cannot be
// read are an error beside those that can.
func Leftovers(dir string) ([]Leftover, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot look for leashes: %w", err)
	}
	boot, err := boottime.ID()
	if err != nil {
		return nil, err
	}
	var all []Leftover
	var errs []error
	for _, e := range entries {
		name, notes := strings.CutSuffix(e.Name(), notesExt)
		if !notes || checkOp(maint.OpID(name)) != nil {
			continue
		}
		s, err := readNotes(dir, maint.OpID(name))
		if errors.Is(err, fs.ErrNotExist) {
			continue // disarmed since
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		alive, err := alive(dir, s.Op)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		all = append(all, Leftover{Status: *s, Alive: alive, Void: s.Boot != boot})
	}
	return all, errors.Join(errs...)
}

// Discard removes what a dead leash has left behind, when its events have been
// journaled. It refuses while the leash lives, and while a guest may still be
// paused, or runs without the leases of its disks: then Client.Attach has it
// released, and the leases taken, if systemd does not start the leash again first.
// Damaged notes tell nobody anything, and go. Those that cannot be read may still
// tell something, to somebody who can, and stay.
func Discard(dir string, op maint.OpID) error {
	if err := checkOp(op); err != nil {
		return err
	}
	lock, err := claim(dir, op)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot discard what the leash of %s has left: %w", op, err)
	}
	defer lock.Close()
	s, err := readNotes(dir, op)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, errDamaged):
		return remove(dir, op)
	case err != nil:
		return fmt.Errorf("cannot discard what the leash of %s has left: %w", op, err)
	}
	boot, err := boottime.ID()
	if err != nil {
		return err
	}
	for _, g := range s.Guests {
		reason := ""
		switch {
		case s.Boot != boot:
		case g.Fate.Held():
			reason = "may still be paused"
		case g.Unleased:
			reason = "may run without the leases of its disks"
		}
		if reason != "" {
			return maint.Problemf(maint.CodeBusy, "guest "+g.Name, "take the leash of "+string(op)+" up again", "%s", reason)
		}
	}
	return remove(dir, op)
}
