package livetest

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"aead.dev/minisign"
	"github.com/pelletier/go-toml/v2"

	"belay/patch/live"
)

// Module makes an ELF file that says of itself, in .modinfo, what it is given ("key=value").
// A real kernel would find nothing else in it.
func Module(info ...string) []byte {
	const header, section = 64, 64
	modinfo := []byte(strings.Join(info, "\x00") + "\x00")
	names := []byte("\x00.modinfo\x00.shstrtab\x00")
	var b bytes.Buffer
	put := func(v any) { _ = binary.Write(&b, binary.LittleEndian, v) } // a buffer takes all
	h := elf.Header64{Type: uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: 1, Ehsize: header,
		Shoff: uint64(header + len(modinfo) + len(names)), Shentsize: section, Shnum: 3, Shstrndx: 2}
	copy(h.Ident[:], elf.ELFMAG)
	h.Ident[elf.EI_CLASS], h.Ident[elf.EI_DATA], h.Ident[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1
	put(h)
	b.Write(modinfo)
	b.Write(names)
	put(elf.Section64{})
	put(elf.Section64{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: header, Size: uint64(len(modinfo)), Addralign: 1})
	put(elf.Section64{Name: 10, Type: uint32(elf.SHT_STRTAB), Off: uint64(header + len(modinfo)), Size: uint64(len(names)), Addralign: 1})
	return b.Bytes()
}

// Vendor makes livepatches and signs them.
type Vendor struct {
	t   testing.TB
	key minisign.PrivateKey
	Pub minisign.PublicKey
}

// NewVendor has a key of its own.
func NewVendor(t testing.TB) *Vendor {
	t.Helper()
	pub, key, err := minisign.GenerateKey(rand.Reader)
	check(t, err)
	return &Vendor{t, key, pub}
}

// Trust puts the vendor's key into a folder of keys, which it makes.
func (v *Vendor) Trust(dir string) {
	v.t.Helper()
	check(v.t, os.MkdirAll(dir, 0o755))
	text, err := v.Pub.MarshalText()
	check(v.t, err)
	check(v.t, os.WriteFile(filepath.Join(dir, "vendor.pub"), text, 0o644))
}

// Spec is what a livepatch is to be.
type Spec struct {
	live.Manifest
	NoLivepatch bool   // it is another kind of module
	VerMagic    string // "": for Release
}

// Make makes a livepatch for a kernel; edit may change what it is, nil leaves it.
func (v *Vendor) Make(name, release, version string, edit func(*Spec)) live.Artifact {
	v.t.Helper()
	s := Spec{Manifest: live.Manifest{Name: name, Release: release, Version: version, Cumulative: true,
		Functions: []string{"vmlinux/meminfo_proc_show"}}}
	if edit != nil {
		edit(&s)
	}
	if s.VerMagic == "" {
		s.VerMagic = s.Release + " SMP preempt mod_unload modversions "
	}
	info := []string{"name=" + name, "vermagic=" + s.VerMagic, "srcversion=" + srcVersion(name), "depends="}
	if !s.NoLivepatch {
		info = append(info, "livepatch=Y")
	}
	if s.Cumulative {
		info = append(info, "x_replace=Y") // a real one has it in a struct, for the kernel alone
	}
	for _, f := range s.Functions {
		info = append(info, "x_function="+f)
	}
	return v.Vouch(Module(info...), s.Manifest)
}

// Vouch makes a manifest for a module that was built, and signs it.
func (v *Vendor) Vouch(module []byte, m live.Manifest) live.Artifact {
	v.t.Helper()
	info, err := live.ReadModInfo(module)
	check(v.t, err)
	a := live.Artifact{Module: module}
	m.Name, m.Size, m.SHA256 = info.Name, int64(len(module)), a.SHA256()
	a.Manifest, err = toml.Marshal(m)
	check(v.t, err)
	a.Signature = v.Sign(a.Manifest)
	return a
}

// Sign signs a manifest as it is.
func (v *Vendor) Sign(manifest []byte) []byte { return minisign.Sign(v.key, manifest) }

func srcVersion(name string) string {
	return strings.ToUpper(fmt.Sprintf("%x", sha256.Sum256([]byte(name)))[:24])
}

// Write writes the three files of a livepatch into a folder and gives the module's path.
func Write(t testing.TB, dir, name string, a live.Artifact) string {
	t.Helper()
	return write(t, dir, name, ".ko", a)
}

func write(t testing.TB, dir, name, ext string, a live.Artifact) string {
	t.Helper()
	check(t, os.MkdirAll(dir, 0o755))
	base := filepath.Join(dir, name)
	check(t, os.WriteFile(base+ext, a.Module, 0o644))
	check(t, os.WriteFile(base+".toml", a.Manifest, 0o644))
	check(t, os.WriteFile(base+".toml.minisig", a.Signature, 0o644))
	return base + ext
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
