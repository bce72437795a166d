package migrate

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"belay/agent/maint"
)

// DiskSource tells which disks of a guest could be copied along.
type DiskSource interface {
	// WrittenDisks are those that the guest writes to, with their sizes.
	WrittenDisks(ctx context.Context, uuid string) ([]maint.GuestDisk, error)
}

// DiskHost is the destination's part in copying disks.
type DiskHost interface {
	// CheckFiles tells which files are the same storage there.
	CheckFiles(ctx context.Context, q maint.FilesQuestion) ([]maint.FileView, error)
	// MakeDisks makes what the reservation's disks are copied into, anew if it has been
	// made before; a *maint.Problem or *maint.Refusal says why not.
	MakeDisks(ctx context.Context, op maint.OpID) error
	// RemoveDisks removes it: the guest has not moved. What was not made is no failure.
	RemoveDisks(ctx context.Context, op maint.OpID) error
}

// DiskCopying is that disks are copied along which the destination does not share.
type DiskCopying struct {
	Which []string // see maint.MigrateRequest.CopyDisks
	From  DiskSource
	To    DiskHost
}

func (c DiskCopying) none() bool {
	return len(c.Which) == 0 || slices.Equal(c.Which, []string{maint.CopyNone})
}

func (c DiskCopying) all() bool { return slices.Equal(c.Which, []string{maint.CopyAll}) }

// Copies are the disks that are copied along, as Survey has found them.
func (m *Migration) Copies() []maint.DiskCopy { return m.copies }

// chooseCopies finds the disks that are to be copied, and takes them out of what the
// destination must have already. files are marked.
func (m *Migration) chooseCopies(ctx context.Context, files []maint.FileNeed) (rest []maint.FileNeed, problems []maint.Problem, err error) {
	m.copies = nil
	if m.Disks.none() {
		return files, nil, nil
	}
	disks, err := m.Disks.From.WrittenDisks(ctx, m.UUID)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot look at the disks of guest %s: %w", m.Guest, err)
	}
	add := func(remedy, format string, args ...any) {
		problems = append(problems, *maint.Problemf(maint.CodeDiskCopy, "guest "+m.Guest, remedy, format, args...))
	}
	if !m.Disks.all() {
		for _, target := range m.Disks.Which {
			if !slices.ContainsFunc(disks, func(d maint.GuestDisk) bool { return d.Target == target }) {
				add("name disks that it writes to (virsh domblklist "+m.word()+"), or none for all of them: --copy-disks", "has no disk %s that it writes to", target)
			}
		}
	}
	disks = slices.DeleteFunc(disks, func(d maint.GuestDisk) bool { return !m.Disks.all() && !slices.Contains(m.Disks.Which, d.Target) })
	var q maint.FilesQuestion
	for _, d := range disks {
		for _, f := range files {
			if f.Same && f.Path == d.Path && d.Why == "" {
				q.Files = append(q.Files, f)
			}
		}
	}
	shared := make(map[string]bool)
	if len(q.Files) > 0 {
		views, err := m.Disks.To.CheckFiles(ctx, q)
		if err != nil {
			return nil, nil, err
		}
		for _, v := range views {
			shared[v.Path] = v.Same
		}
	}
	for _, d := range disks {
		switch {
		case d.Why != "" && m.Disks.all(): // whether it is shared is judged with all else
		case d.Why != "":
			add("put it on storage that both hosts share, or leave it out of --copy-disks", "disk %s cannot be copied: %s", d.Target, d.Why)
		case shared[d.Path] && !m.Disks.all():
			add("leave it out of --copy-disks", "disk %s (%s) is on storage that %s shares", d.Target, d.Path, m.To)
		case !shared[d.Path]:
			m.copies = append(m.copies, d.DiskCopy)
		}
	}
	return slices.DeleteFunc(files, func(f maint.FileNeed) bool { return f.Same && m.isCopied(f.Path) }), problems, nil
}

func (m *Migration) isCopied(path string) bool {
	return slices.ContainsFunc(m.copies, func(d maint.DiskCopy) bool { return d.Path == path })
}

// copyParams adds the disks to what libvirt is told. One number bounds each of its streams,
// each disk's and then memory's: the disks, which come first, get equal shares.
func (m *Migration) copyParams(p *maint.MoveParams) {
	for _, d := range m.copies {
		p.CopyDisks = append(p.CopyDisks, d.Target)
		p.CopyOverlays = p.CopyOverlays || d.Backing != ""
	}
	if n := uint64(len(m.copies)); n > 1 && p.BandwidthMiBs > 0 {
		p.BandwidthMiBs = max(1, p.BandwidthMiBs/n)
	}
	// What a guest writes to a disk faster than the network takes it would keep the copy
	// of that disk from its end: where it may be slowed down, its writes wait instead.
	p.SyncWrites = len(m.copies) > 0 && slices.Contains(m.Allow, maint.MeansSlow)
}

// disksLeft says how far a copy got that was still at its disks, "" for any other.
func (m *Migration) disksLeft() string {
	if m.seen.DiskLeft == 0 || m.seen.Iteration > 0 {
		return ""
	}
	return fmt.Sprintf("of its disks, %s are left of %s, at %s/s, with what it writes meanwhile", MiB(m.seen.DiskLeft), MiB(m.seen.DiskTotal), MiB(m.seen.DiskPerSecond))
}

// makeDisks has the destination make what disks are copied into, anew for each copy.
func (m *Migration) makeDisks(ctx context.Context, disks []maint.DiskCopy) error {
	if m.copies = disks; len(disks) == 0 {
		return nil
	}
	return m.retry(ctx, restartGrace, func(ctx context.Context) error { return m.Disks.To.MakeDisks(ctx, m.Op) })
}

// RemoveDisks has the destination remove what it has made for disks: the guest has not
// moved. It never fails: a destination that cannot be asked now asks by itself later.
func (m *Migration) RemoveDisks(ctx context.Context, s Scratch) error {
	disks, err := m.Left(s)
	if err != nil || len(disks) == 0 {
		return err
	}
	err = m.retry(ctx, restartGrace, func(ctx context.Context) error { return m.Disks.To.RemoveDisks(ctx, m.Op) })
	if err != nil {
		return s.Note("%s has not removed the disks it had made for this: %v; it looks again by itself (belay status, there)", m.To, err)
	}
	return nil
}

// Left are the disks that are copied along. After the move their images are left on the
// source.
func (m *Migration) Left(s Scratch) ([]maint.DiskCopy, error) {
	var b before
	_, err := s.Load(PhasePreflight, &b)
	return b.Arrival.Disks, err
}

// DiskPlace is what a destination finds where a disk is to be made.
type DiskPlace struct {
	Known   bool   // else belayd may not look
	Hangs   bool   // its storage did not answer in time
	Folder  bool   // there is a folder to make it in
	Real    string // that folder, without symbolic links
	Denied  bool   // belayd may not write to that folder
	There   bool   // something is at its path
	Storage uint64
	Free    uint64 // of that storage, bytes
	Taken   uint64 // by what is at its path, bytes
}

// Claims are what is promised of a host's storage, bytes by DiskPlace.Storage.
type Claims map[uint64]uint64

// DiskChecks is what a destination knows when it judges disks that are to be copied to it.
type DiskChecks struct {
	Host    string
	Places  map[string]DiskPlace // by path
	Claims  Claims               // of others
	QemuImg bool                 // the program is there
	// InTheWay says what is known of what is at a path, and the remedy; "" for what is
	// made for this very operation.
	InTheWay func(path string) (what, remedy string)
}

// CheckDisks lists every reason why disks cannot be copied to this host.
func CheckDisks(disks []maint.DiskCopy, c DiskChecks) (ps []maint.Problem) {
	host := "host " + c.Host
	add := func(code maint.Code, remedy, format string, args ...any) {
		ps = append(ps, *maint.Problemf(code, host, remedy, format, args...))
	}
	wanted, free := make(Claims), make(Claims)
	names := make(map[uint64][]string)
	for _, d := range disks {
		p := c.Places[d.Path]
		what, remedy := "", ""
		if p.There {
			what, remedy = c.InTheWay(d.Path)
		}
		switch {
		case p.Hangs:
			add(maint.CodeStorageHangs, reviveIt, "its storage does not answer for %s, where disk %s is to be copied to", d.Path, d.Target)
			continue
		case !p.Known || p.Denied:
			add(maint.CodeDiskCopy, "let belayd write there: add the folder to ReadWritePaths of its unit (systemctl edit belayd), and see that root may",
				"its belayd may not make %s, where disk %s is to be copied to", d.Path, d.Target)
			continue
		case !p.Folder:
			add(maint.CodeDiskMissing, "make it there, on storage that has room", "has no folder for %s, where disk %s is to be copied to", d.Path, d.Target)
			continue
		case what != "":
			add(maint.CodeDiskInTheWay, remedy, "%s, where disk %s is to be copied to, is there already: %s", d.Path, d.Target, what)
		}
		if d.Format == "qcow2" && !c.QemuImg {
			add(maint.CodeDiskCopy, "install it (Debian: qemu-utils)", "has no qemu-img, which makes %s images", d.Format)
		}
		wanted[p.Storage] += d.Room() - min(d.Room(), p.Taken)
		free[p.Storage] = p.Free
		names[p.Storage] = append(names[p.Storage], d.Path)
	}
	for storage, bytes := range wanted {
		if left := minus(free[storage], c.Claims[storage]); bytes > left {
			add(maint.CodeNoRoom, "make room there, put the folder on larger storage, or choose another peer",
				"has %s for %s, which take up to %s (free %s, promised to other arrivals %s)",
				MiB(left), strings.Join(names[storage], ", "), MiB(bytes), MiB(free[storage]), MiB(c.Claims[storage]))
		}
	}
	slices.SortStableFunc(ps, func(a, b maint.Problem) int { return cmp.Compare(a.Reason, b.Reason) })
	return ps
}
