package livetest

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/patch/live"
)

// Programs are QEMUs that take livepatches, as libpulp would give them. It implements
// live.UserSpace.
type Programs struct {
	Keys string // the folder of the keys that are trusted

	mu      sync.Mutex
	qemus   map[string]*program // by guest
	started uint64
	// OnSet, if set, is called before a livepatch is applied or taken back; its error is
	// what comes of it, and nothing is done.
	OnSet func(guest string, on bool) error
}

type program struct {
	live.QEMU
	stock   bool
	builds  []string // of the libraries that it has mapped
	applied []string // SHA-256
	unsure  bool
}

// NewPrograms has none that runs.
func NewPrograms(keys string) *Programs {
	return &Programs{Keys: keys, qemus: make(map[string]*program)}
}

// Run starts a guest's QEMU with libraries of those builds; with none it is a stock one. One that
// ran before has ended.
func (p *Programs) Run(guest string, builds ...string) live.QEMU {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.started++
	q := live.QEMU{Guest: guest, PID: 1000 + int(p.started), Start: p.started}
	p.qemus[guest] = &program{QEMU: q, stock: len(builds) == 0, builds: builds}
	return q
}

// End ends a guest's QEMU.
func (p *Programs) End(guest string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.qemus, guest)
}

// Process finds a guest's QEMU.
func (p *Programs) Process(guest string) (live.QEMU, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	q := p.qemus[guest]
	if q == nil {
		return live.QEMU{}, fmt.Errorf("guest %s has no process: %w", guest, unix.ESRCH)
	}
	return q.QEMU, nil
}

// Patched names the guests whose QEMU has any livepatch.
func (p *Programs) Patched() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var names []string
	for name, q := range p.qemus {
		if len(q.applied) > 0 {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return strings.Join(names, " ")
}

// find judges a livepatch and a process as live.Libpulp does.
func (p *Programs) find(q live.QEMU, a live.Artifact) (*program, error) {
	keys, err := live.ReadKeys(p.Keys)
	if err != nil {
		return nil, err
	}
	m, err := a.CheckContainer(keys)
	if err != nil {
		return nil, err
	}
	now := p.qemus[q.Guest]
	switch {
	case now == nil || now.QEMU != q:
		return nil, fmt.Errorf("process %d of guest %s: %w", q.PID, q.Guest, unix.ESRCH)
	case now.unsure:
		return nil, maint.Problemf(maint.CodeQEMUUnsure, "guest "+q.Guest, "move it", "its QEMU may be inconsistent")
	case now.stock:
		return nil, live.QEMUVerdict(q.Guest, "it was not started with libpulp.so preloaded")
	case !slices.Contains(now.builds, m.BuildID):
		return nil, live.QEMUVerdict(q.Guest, "it has not mapped "+m.Library)
	}
	return now, nil
}

// Patchable implements live.UserSpace.
func (p *Programs) Patchable(_ context.Context, q live.QEMU, a live.Artifact) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, err := p.find(q, a)
	return err
}

// Applied implements live.UserSpace.
func (p *Programs) Applied(_ context.Context, q live.QEMU, a live.Artifact) (bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now, err := p.find(q, a)
	return err == nil && slices.Contains(now.applied, a.SHA256()), err
}

// Set implements live.UserSpace.
func (p *Programs) Set(_ context.Context, q live.QEMU, a live.Artifact, on bool) (time.Duration, error) {
	const took = time.Millisecond
	if p.OnSet != nil {
		if err := p.OnSet(q.Guest, on); err != nil {
			p.mu.Lock()
			defer p.mu.Unlock()
			if now := p.qemus[q.Guest]; now != nil {
				now.unsure = live.Unsure(err)
			}
			return took, err
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now, err := p.find(q, a)
	if err != nil {
		return 0, err
	}
	i := slices.Index(now.applied, a.SHA256())
	switch {
	case (i >= 0) == on:
		return took, maint.Problemf(maint.CodeQEMURefused, "guest "+q.Guest, "", "ulp has not patched it")
	case on:
		now.applied = append(now.applied, a.SHA256())
	default:
		now.applied = slices.Delete(now.applied, i, i+1)
	}
	return took, nil
}

// Container makes an ELF file with the sections that libpulp's containers have, and signs it
// for a library of a build. A real libpulp would find nothing in it.
func (v *Vendor) Container(name, build string) live.Artifact {
	v.t.Helper()
	return v.VouchContainer(image([]byte(name), ".ulp", ".ulp.rev"), live.UserManifest{Name: name, Library: "libtarget.so.1", BuildID: build})
}

// VouchContainer makes a manifest for a container that was built, and signs it.
func (v *Vendor) VouchContainer(container []byte, m live.UserManifest) live.Artifact {
	v.t.Helper()
	a := live.Artifact{Module: container}
	m.Size, m.SHA256 = int64(len(container)), a.SHA256()
	var err error
	a.Manifest, err = toml.Marshal(m)
	check(v.t, err)
	a.Signature = v.Sign(a.Manifest)
	return a
}

// WriteContainer writes the three files of a library's livepatch into a folder and gives the
// container's path.
func WriteContainer(t testing.TB, dir, name string, a live.Artifact) string {
	t.Helper()
	return write(t, dir, name, ".so", a)
}

// Library is an ELF file that has nothing but a build ID, hexadecimal.
func Library(build string) []byte {
	id, err := hex.DecodeString(build)
	if err != nil {
		panic(err) // a test's own
	}
	note := binary.LittleEndian.AppendUint32(nil, 4)
	note = binary.LittleEndian.AppendUint32(note, uint32(len(id)))
	note = binary.LittleEndian.AppendUint32(note, 3) // NT_GNU_BUILD_ID
	return image(append(append(note, "GNU\x00"...), id...), ".note.gnu.build-id")
}

// image is an ELF file with sections of those names, all of the same content.
func image(text []byte, sections ...string) []byte {
	const header, section = 64, 64
	names, at := []byte{0}, make([]uint32, 0, len(sections)+1)
	for _, s := range append(sections, ".shstrtab") {
		at = append(at, uint32(len(names)))
		names = append(append(names, s...), 0)
	}
	var b bytes.Buffer
	put := func(v any) { _ = binary.Write(&b, binary.LittleEndian, v) } // a buffer takes all
	h := elf.Header64{Type: uint16(elf.ET_DYN), Machine: uint16(elf.EM_X86_64), Version: 1, Ehsize: header,
		Shoff: uint64(header + len(text) + len(names)), Shentsize: section, Shnum: uint16(len(sections) + 2), Shstrndx: uint16(len(sections) + 1)}
	copy(h.Ident[:], elf.ELFMAG)
	h.Ident[elf.EI_CLASS], h.Ident[elf.EI_DATA], h.Ident[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1
	put(h)
	b.Write(text)
	b.Write(names)
	put(elf.Section64{})
	for i := range sections {
		put(elf.Section64{Name: at[i], Type: uint32(elf.SHT_PROGBITS), Off: header, Size: uint64(len(text)), Addralign: 1})
	}
	put(elf.Section64{Name: at[len(sections)], Type: uint32(elf.SHT_STRTAB), Off: uint64(header + len(text)), Size: uint64(len(names)), Addralign: 1})
	return b.Bytes()
}
