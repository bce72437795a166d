package guest

import (
	"bytes"
	"fmt"
)

// archive is an initramfs in the making: a cpio of the "newc" kind (kernel:
// Documentation/driver-api/early-userspace/buffer-format.rst). Owners are
// root, times are 0, so equal inputs give equal bytes.
type archive struct {
	buf   bytes.Buffer
	inode uint32
}

// Modes of stat(2).
const (
	modeDir  = 0o040000
	modeFile = 0o100000
	modeLink = 0o120000
	modeChar = 0o020000
)

func (a *archive) dir(name string) { a.add(name, modeDir|0o755, nil, 0, 0) }

func (a *archive) file(name string, perm uint32, body []byte) { a.add(name, modeFile|perm, body, 0, 0) }

func (a *archive) link(name, target string) { a.add(name, modeLink|0o777, []byte(target), 0, 0) }

func (a *archive) char(name string, perm, major, minor uint32) {
	a.add(name, modeChar|perm, nil, major, minor)
}

// finish ends the archive and returns it.
func (a *archive) finish() []byte {
	a.inode = 0
	a.add("TRAILER!!!", 0, nil, 0, 0)
	return a.buf.Bytes()
}

func (a *archive) add(name string, mode uint32, body []byte, major, minor uint32) {
	a.inode++
	fmt.Fprintf(&a.buf, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		a.inode, mode, 0, 0, 1, 0, len(body), 0, 0, major, minor, len(name)+1, 0)
	a.buf.WriteString(name)
	a.buf.WriteByte(0)
	a.pad()
	a.buf.Write(body)
	a.pad()
}

func (a *archive) pad() {
	for a.buf.Len()%4 != 0 {
		a.buf.WriteByte(0)
	}
}
