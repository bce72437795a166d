package kexec

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/patch/internal/linux"
	"belay/patch/vmm"
)

// A guest whose memory is a file in the reserved memory already is not copied there: its QEMU hands
// over the state of its devices, which is what UUID.save has then, and ends. UUID.memory, a folder,
// has links to the file, since libvirt removes its own. A QEMU that restores it maps the same file.
//
//	UUID.paused   the guest is paused, by Belay, in its old QEMU      before the pause
//	UUID.save     the state, and the checksum of the memory           when that QEMU has sent it
//	UUID.quit     that QEMU is being ended; it was UUID.paused        before it is told to quit
//
// Until UUID.quit is there whoever finds the guest in its old QEMU has it run on, and puts UUID.save
// aside before. From then on there is no way back but by the new QEMU: the old one may end in any
// moment, and is told again to, unless it says itself that somebody has resumed the guest. What has
// run since is told by the checksum, too, which the memory does not have any more.

const (
	memoryExt = ".memory"
	pausedExt = ".paused"
	quitExt   = ".quit"
	// restoringExt is the hook's: libvirt is about to restore the guest, and may start it.
	restoringExt = ".restoring"
)

// inPlaceMagic is how UUID.save begins of a guest whose memory is in place; libvirt's begins otherwise.
// libvirt's hook reads its first lines; see vmm.Seat.Order.
const inPlaceMagic = "BelayMemoryInPlace"

// hookFile is Belay's hook. It gives the memory to the QEMU that restores the guest.
const hookFile = "/etc/libvirt/hooks/qemu.d/belay"

// leaving is a guest that is leaving its QEMU: what UUID.paused and UUID.quit have, and, with State and Memory, UUID.save.
type leaving struct {
	Boot   string    `json:"boot"` // the host's
	Guest  member    `json:"guest"`
	Token  string    `json:"token"` // of the QEMU that it is to enter
	Seat   vmm.Seat  `json:"seat"`
	Begun  time.Time `json:"begun"`
	State  []byte    `json:"state,omitempty"` // of its devices, as QEMU migrates it
	Memory []summed  `json:"memory,omitempty"`
}

// summed is a file of a guest's memory, as it was when the guest left its QEMU.
type summed struct {
	Name string `json:"name"` // in the folder
	Size int64  `json:"size"`
	Sum  string `json:"sum"` // see sum
}

// maxLeaving bounds UUID.save of a guest whose memory is in place, bytes: there is room for any state
// that a Mover takes, in base64, and all else. What could not be read again must not be written.
const maxLeaving = vmm.StateLimit/3*4 + maxSealed

// encode is what UUID.save has.
func (l leaving) encode() ([]byte, error) {
	text, err := seal(l)
	return append([]byte(l.Seat.Order(inPlaceMagic, l.Token)), text...), err
}

// readLeaving reads a guest's UUID.save.
func readLeaving(name string) (l leaving, err error) {
	b, err := linux.ReadFile(name, maxLeaving)
	if err != nil {
		return l, err
	}
	parts := bytes.SplitN(b, []byte("\n"), 4)
	if len(parts) < 4 || !bytes.HasPrefix(b, []byte(inPlaceMagic+" ")) {
		return l, fmt.Errorf("%s %w: its beginning is", name, errDamaged)
	}
	return l, unseal(name, parts[3], &l)
}

// stayed reports whether what is saved of a guest is of one whose memory is in place: such a guest may have
// been copied after all.
func stayed(name string) (bool, error) {
	f, err := os.Open(name)
	if err != nil {
		return false, err
	}
	defer f.Close()
	head := make([]byte, len(inPlaceMagic))
	if _, err := io.ReadFull(f, head); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return false, err
	}
	return isInPlace(head), nil
}

// isInPlace reports whether a guest's UUID.save is of one whose memory is in place.
func isInPlace(head []byte) bool { return bytes.HasPrefix(head, []byte(inPlaceMagic)) }

// seat is a guest in its QEMU, with its memory by the folder's own paths. why says what keeps its
// memory from staying in place, "" if nothing does. Its QEMU is asked, and tried, last.
func (j *Job) seat(ctx context.Context, g maint.Guest, token string) (s vmm.Seat, why string) {
	if !j.InPlace {
		return s, "kexec.in_place is false"
	}
	if hook, err := j.Tree.text(hookFile); err != nil || !strings.Contains(hook, inPlaceMagic) || !strings.Contains(hook, "\nkept="+j.dir()+"\n") {
		return s, fmt.Sprintf("Belay's hook of libvirt, %s, is not there, of another version, or does not look in %s (kexec.dir)", hookFile, j.Dir)
	}
	if g.MemorySource != "file" || !g.MemoryShared {
		return s, "its memory is in no shared file"
	}
	if p := j.Tree.NotInPlace(j.Dir); p != nil {
		return s, p.Reason
	}
	if len(j.Tree.memory(j.Dir, fmt.Sprintf("%d-*", g.ID))) == 0 {
		return s, "its memory is not in reserved memory: libvirt has made it elsewhere"
	}
	s, against, err := j.Mover.Seat(ctx, g.UUID, token)
	if err != nil {
		return s, err.Error()
	}
	if len(against) > 0 {
		var all []string
		for _, p := range against {
			all = append(all, p.Reason)
		}
		return s, strings.Join(all, "; ")
	}
	for i, path := range s.Memory {
		if s.Memory[i], why = j.Tree.lasting(j.Dir, path); why != "" {
			return s, "its memory: " + why
		}
	}
	s.Kept = filepath.Join(j.Dir, g.UUID+memoryExt)
	return s, ""
}

// within gives the path of a file below dir that has another path in another mount of dir's file
// system, or says why it is not there.
func (t Tree) within(dir, path string) (inside, why string) {
	region, err := t.Mount(dir)
	if err != nil {
		return "", err.Error()
	}
	m, err := t.Mount(path)
	switch {
	case err != nil:
		return "", err.Error()
	case m.Device != region.Device:
		return "", fmt.Sprintf("%s is not in reserved memory", path)
	case !m.DAX:
		return "", fmt.Sprintf("%s would be in the page cache, too: %s is not mounted with -o dax", path, m.Point)
	}
	below, err := filepath.Rel(region.Root, filepath.Join(m.Root, strings.TrimPrefix(path, m.Point)))
	if err != nil || strings.HasPrefix(below, "..") {
		return "", fmt.Sprintf("%s is in the reserved memory, but not below %s", path, dir)
	}
	inside = filepath.Join(dir, below)
	if !t.exists(inside) {
		return "", fmt.Sprintf("%s is not found as %s", path, inside)
	}
	return inside, ""
}

// lasting is within, and the file has its other path after a boot, too.
func (t Tree) lasting(dir, path string) (inside, why string) {
	if inside, why = t.within(dir, path); why != "" {
		return "", why
	}
	if m, err := t.Mount(path); err != nil || !t.mountsAtBoot(m.Point) {
		return "", fmt.Sprintf("%s would not be mounted after a boot: /etc/fstab has nothing of it", m.Point)
	}
	return inside, ""
}

// backingDir is libvirt's memory_backing_dir, by its default (libvirt, qemu.conf).
const backingDir = "/var/lib/libvirt/qemu/ram"

var backingSetting = regexp.MustCompile(`(?m)^[ \t]*memory_backing_dir[ \t]*=[ \t]*["']([^"'\n]*)["']`)

// backing is where libvirt makes guests' memory, from its next start on, and in there rams, with a folder
// for each domain (libvirt, virQEMUDriverConfigLoadMemoryEntry).
func (t Tree) backing() (folder, rams string) {
	conf, _ := t.text("/etc/libvirt/qemu.conf")
	if m := backingSetting.FindStringSubmatch(conf); m != nil { // the first one counts
		return m[1], filepath.Join(m[1], "libvirt/qemu")
	}
	return backingDir, backingDir
}

// memory are the files below dir that match a pattern in libvirt's folder of guests' memory, as this process
// sees them: ID-NAME/FILE.
func (t Tree) memory(dir, pattern string) []string {
	_, rams := t.backing()
	inside, why := t.within(dir, rams)
	if why != "" {
		return nil
	}
	files, _ := filepath.Glob(filepath.Join(t.at(inside), pattern))
	return files
}

// NotInPlace says why libvirt makes no guest's memory in the reserved memory that is mounted on dir;
// nil: it does, for those that are defined so.
func (t Tree) NotInPlace(dir string) *maint.Problem {
	folder, _ := t.backing()
	if _, why := t.lasting(dir, folder); why != "" {
		return maint.Problemf(maint.CodeNoRegion, host, "mkdir -p -m 711 "+inPlaceDir+"; in /etc/fstab: "+inPlaceLine+
			`; in /etc/libvirt/qemu.conf: memory_backing_dir = "`+inPlaceDir+`"; mount it, restart libvirt's daemon; guests' next starts are with it`, "%s", why)
	}
	return nil
}

// inPlaceDir is where the reserved memory is mounted once more for QEMU, which cannot enter Belay's folder.
const (
	inPlaceDir  = "/var/lib/libvirt/belay"
	inPlaceLine = "/dev/pmem0 " + inPlaceDir + " ext4 dax,nofail,x-systemd.after=var-lib-belay-memory.mount,x-systemd.before=libvirtd.service,x-systemd.before=virtqemud.service,x-systemd.device-timeout=90s 0 0"
)

// exposed says who else than root can replace what is in a folder, "" if nobody can.
func (t Tree) exposed(dir string) (who string) {
	var st unix.Stat_t
	if unix.Stat(t.at(dir), &st) != nil {
		return ""
	}
	switch {
	case int(st.Uid) != os.Geteuid():
		return fmt.Sprintf("user %d", st.Uid)
	case st.Mode&0o022 != 0:
		return "others"
	}
	return ""
}

// grows is how much files of guests' memory may take yet, bytes: a file has the room that was written to.
func grows(files ...string) (bytes uint64) {
	for _, name := range files {
		var st unix.Stat_t
		if unix.Stat(name, &st) == nil && st.Size > st.Blocks*512 {
			bytes += uint64(st.Size - st.Blocks*512)
		}
	}
	return bytes
}

// file is a guest's, as this process sees it.
func (j *Job) file(uuid, ext string) string {
	return filepath.Join(j.dir(), filepath.Base(uuid)+ext)
}

// sumMemory has what a guest has written be in the reserved memory, not in a processor's cache only,
// and sums it.
func (j *Job) sumMemory(ctx context.Context, s vmm.Seat) (all []summed, err error) {
	for _, path := range s.Memory {
		f := summed{Name: filepath.Base(path)}
		name := filepath.Join(j.Tree.at(s.Kept), f.Name)
		if err := linux.Sync(name); err != nil {
			return nil, err
		}
		if f.Sum, f.Size, err = sum(ctx, name); err != nil {
			return nil, err
		}
		all = append(all, f)
	}
	return all, nil
}

// intact says whether a guest's memory is what it was when it left its QEMU.
func (j *Job) intact(ctx context.Context, l leaving) (bool, error) {
	for _, f := range l.Memory {
		got, size, err := sum(ctx, filepath.Join(j.file(l.Seat.UUID, memoryExt), filepath.Base(f.Name)))
		if err != nil || got != f.Sum || size != f.Size {
			return false, err
		}
	}
	return true, nil
}

// remove removes a file, if it is there.
func remove(name string) error {
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// enter has a guest enter a new QEMU, in which its vCPUs are stopped.
func (b *bringing) enter(ctx context.Context, l leaving) error {
	if l.Seat.UUID != b.UUID || b.j.Mover.Host == nil {
		return fmt.Errorf("%s is of another guest, or of another host", b.path())
	}
	return b.j.Mover.Enter(ctx, l.Seat, l.Token, l.State)
}

// isGone reports whether what could not be read is not there any more, as it was written.
func isGone(err error) bool {
	for _, gone := range []error{fs.ErrNotExist, errDamaged, unix.EIO, unix.EHWPOISON} {
		if errors.Is(err, gone) {
			return true
		}
	}
	return false
}

// whole says whether what is kept of a guest is as it was saved; lost: why not. That it cannot be
// looked at now, as by a process that has too many files open, says nothing: that is err. Memory that was
// tried is not compared again; where Belay did not see what came of that it may have run, and is.
func (b *bringing) whole(ctx context.Context, e *entry, tried bool) (l leaving, lost string, err error) {
	judge := func(err error) (leaving, string, error) {
		if ctx.Err() != nil {
			return l, "", ctx.Err()
		}
		if isGone(err) {
			return l, err.Error(), nil
		}
		return l, "", err
	}
	got, size, err := sum(ctx, e.file(b.j.dir()))
	switch {
	case err != nil:
		return judge(err)
	case got != e.Sum || size != e.Size:
		return l, damaged, nil
	case e.Memory != inPlace:
		return l, "", nil
	}
	if l, err = readLeaving(e.file(b.j.dir())); err != nil {
		return judge(err)
	}
	if tried {
		return l, "", nil // a QEMU that takes the state in may write to it
	}
	intact, err := b.j.intact(ctx, l)
	if err != nil {
		return judge(err)
	}
	if !intact {
		return l, damaged, nil
	}
	return l, "", nil
}

const damaged = "its checksum is another: the reserved memory was damaged"

// settleQEMU leaves a guest's new QEMU as any other.
func (b *bringing) settleQEMU(ctx context.Context, e *entry) *maint.Problem {
	s := vmm.Seat{Guest: b.Name, UUID: b.UUID}
	if err := b.j.Mover.Settle(ctx, s); err != nil {
		return s.LeftBehind(err)
	}
	return nil
}

// way is how a guest's memory was kept.
func (e entry) way() maint.KexecMemory {
	if e.Memory == inPlace {
		return maint.KexecInPlace
	}
	return maint.KexecCopied
}
