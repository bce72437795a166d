package maint

import (
	"fmt"
	"slices"
)

// The words that stand for disks in MigrateRequest.CopyDisks.
const (
	CopyAll  = "all"  // every one that is written to and not shared
	CopyNone = "none" // none
)

// CheckCopyDisks says what of a choice of disks to copy cannot be meant, "" when all
// can. Whether a guest has such disks is seen later.
func CheckCopyDisks(which []string) string {
	for _, word := range which {
		switch {
		case (word == CopyAll || word == CopyNone) && len(which) > 1:
			return fmt.Sprintf("%q stands alone", word)
		case !plain(word, maxWord):
			return fmt.Sprintf("%.60q is no disk's name", word)
		}
	}
	return ""
}

// DiskCopy is a disk that is copied with its guest: an image file that is to be made
// on the destination, at the same path, and that libvirt fills by NBD.
type DiskCopy struct {
	Target string `json:"target"` // vda
	Path   string `json:"path"`
	Format string `json:"format"` // raw, qcow2
	Bytes  uint64 `json:"bytes"`  // that the guest sees
	// Allocated is what the image takes on the source's storage, bytes.
	Allocated uint64 `json:"allocated_bytes"`
	// Backing is the image that it is an overlay of, "" for none. It is only read, and
	// is not copied.
	Backing       string `json:"backing,omitempty"`
	BackingFormat string `json:"backing_format,omitempty"`
}

// Formats are those of images that can be copied.
var Formats = []string{"raw", "qcow2"}

// Room is what the copy may take, bytes. QEMU writes zeros for what a raw image has not
// allocated, and whether that makes holes is up to the file system: room for all of it is
// kept. A qcow2 image takes what it takes now, and a sixteenth for tables and for what
// the guest writes meanwhile; it can grow after that, as it could before.
func (d DiskCopy) Room() uint64 {
	if d.Format == "raw" {
		return d.Bytes
	}
	const least = 1 << 20
	return d.Allocated + d.Allocated/16 + least
}

// GuestDisk is a disk that a guest writes to.
type GuestDisk struct {
	DiskCopy
	Why string // it cannot be copied, "" where it can
}

// validDisks says what of disks cannot be meant, "" when all can.
func validDisks(disks []DiskCopy) string {
	if len(disks) > maxNeeds {
		return fmt.Sprintf("%d are more than %d", len(disks), maxNeeds)
	}
	const most = 1 << 50 // bytes; maxNeeds of them are still in range
	seen := make(map[string]bool)
	for _, d := range disks {
		switch {
		case !plain(d.Target, maxWord) || !cleanPath(d.Path) || !slices.Contains(Formats, d.Format):
			return fmt.Sprintf("%.60q is no image that can be copied", d.Path)
		case d.Bytes == 0 || d.Bytes > most || d.Allocated > most:
			return fmt.Sprintf("%d bytes of %.60q are out of range", d.Bytes, d.Path)
		case d.Backing != "" && (d.Format != "qcow2" || !cleanPath(d.Backing) || !slices.Contains(Formats, d.BackingFormat)):
			return fmt.Sprintf("%.60q is no image that one can be an overlay of", d.Backing)
		case seen[d.Path] || seen[d.Target]:
			return fmt.Sprintf("%.60q is named twice", d.Path)
		}
		seen[d.Path], seen[d.Target] = true, true
	}
	return ""
}

// FilesQuestion asks which of a guest's files a host has, marked by who asks.
type FilesQuestion struct {
	Files []FileNeed `json:"files"`
}

// Validate refuses what cannot be meant.
func (q FilesQuestion) Validate() error {
	if why := (Needs{Files: q.Files}).validate(); why != "" {
		return Problemf(CodeBadRequest, "files", "", "%s", why)
	}
	return nil
}

// FileView is what a host has at a path.
type FileView struct {
	Path string `json:"path"`
	// Same is that nothing speaks against its being the same storage as at who asks;
	// it is so also where the host may not look, or its storage does not answer.
	Same bool `json:"same"`
}

// DisksState is what became of files that were made for disks on their way.
//
//	making ──► made ──► kept    the guest has moved: they are its disks
//	   └────────┴─────► gone    it has not: they were removed
type DisksState string

// The states of files that were made for disks.
const (
	DisksMaking DisksState = "making" // written down before the first is made
	DisksMade   DisksState = "made"   // and before the first is put at its path
	DisksKept   DisksState = "kept"
	DisksGone   DisksState = "gone"
)

// Open reports whether it is still to be seen what becomes of them.
func (s DisksState) Open() bool { return s == DisksMaking || s == DisksMade }

// MadeDisks are the files that a destination makes for the disks of a guest on its way.
type MadeDisks struct {
	Op        OpID       `json:"op"`
	From      string     `json:"from"` // the source host's certificate name
	Guest     string     `json:"guest"`
	GuestUUID string     `json:"guest_uuid"`
	State     DisksState `json:"state"`
	Files     []MadeFile `json:"files"`
}

// MadeFile is one of them. It is made under a name that nobody can guess, and put at its
// path when it is known which file it is, so that no other is ever taken for it.
type MadeFile struct {
	DiskCopy
	Temp string `json:"temp"` // where it is made, in the same folder
	// Device, Inode and Born tell it from any other, once it is made. Born is when it was,
	// nanoseconds since 1970; 0 where the file system does not say.
	Device uint64 `json:"device,omitempty"`
	Inode  uint64 `json:"inode,omitempty"`
	Born   int64  `json:"born,omitempty"`
}

// MoveEnd is how a migration ended, for the destination, which may not have been told.
type MoveEnd string

// The ends of a migration.
const (
	MoveOpen    MoveEnd = "open"      // it has not
	MoveDone    MoveEnd = "moved"     // the guest has moved
	MoveNot     MoveEnd = "not-moved" // it has not, and no copy of this operation comes any more
	MoveUnknown MoveEnd = "unknown"   // nobody knows
)
