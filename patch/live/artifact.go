package live

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"aead.dev/minisign"
	"belay/agent/maint"
	"belay/patch/internal/linux"
	"github.com/pelletier/go-toml/v2"
)

// Artifact is a livepatch as it comes, and as it goes to the kernel or into a QEMU: what was
// judged is these bytes, and these bytes are loaded.
type Artifact struct {
	Module    []byte // ELF: a kernel module, or libpulp's container
	Manifest  []byte // TOML
	Signature []byte // minisign, of Manifest
}

// Manifest is what whoever signs a livepatch vouches for.
type Manifest struct {
	Name       string   `toml:"name"`    // of the module
	SHA256     string   `toml:"sha256"`  // of the module's file, hexadecimal
	Size       int64    `toml:"size"`    // of the module's file, bytes
	Release    string   `toml:"release"` // uname -r of its kernel
	Version    string   `toml:"version"` // uname -v of its kernel: builds share a release
	Cumulative bool     `toml:"cumulative"`
	Covers     []string `toml:"covers"`
	// Reboot are changes that this kernel wants and that no livepatch can bring.
	Reboot []string `toml:"reboot"`
	// Functions are those that it changes, as object/function.
	Functions []string `toml:"functions"`
	// Modules are the srcversions of the modules that it changes, or their build IDs where they have none.
	Modules map[string]string `toml:"modules"`
}

// Bounds of the files, bytes.
const (
	maxModule   = 64 << 20
	maxManifest = 1 << 20
)

// The endings of the manifest and of its signature, in the module's ".ko"'s place.
const (
	moduleExt    = ".ko"
	containerExt = ".so"
	manifestExt  = ".toml"
	signatureExt = ".toml.minisig"
)

// ReadArtifact reads the three files of a livepatch by its module's path.
func ReadArtifact(file string) (a Artifact, err error) {
	if !filepath.IsAbs(file) || filepath.Ext(file) != moduleExt {
		return a, maint.Problemf(maint.CodePatchFile, "livepatch "+file, "give the absolute path of an uncompressed module, FILE.ko", "is no path of a module")
	}
	return readFiles(file, moduleExt)
}

func readFiles(file, ext string) (a Artifact, err error) {
	base := strings.TrimSuffix(file, ext)
	for _, f := range []struct {
		to  *[]byte
		ext string
		max int64
	}{{&a.Module, ext, maxModule}, {&a.Manifest, manifestExt, maxManifest}, {&a.Signature, signatureExt, maxManifest}} {
		if *f.to, err = linux.ReadFile(base+f.ext, f.max); err != nil {
			return a, maint.Problemf(maint.CodePatchFile, "livepatch "+file,
				"a livepatch is three files side by side: NAME"+ext+", NAME.toml and NAME.toml.minisig", "%v", err)
		}
	}
	return a, nil
}

// DefaultKeys is the folder of the keys that livepatches are trusted by.
const DefaultKeys = "/etc/belay/keys"

// Key is a minisign public key that livepatches are trusted by.
type Key struct {
	minisign.PublicKey
	File string
}

// ReadKeys reads the *.pub files of a folder, each a minisign public key. The folder and its
// files must be root's alone to write.
func ReadKeys(dir string) ([]Key, error) {
	const remedy = "put minisign public keys (*.pub) there, owned by root and writable by nobody else"
	bad := func(format string, args ...any) ([]Key, error) {
		return nil, maint.Problemf(maint.CodePatchSigned, "keys "+dir, remedy, format, args...)
	}
	folder, err := linux.OpenTrusted(dir)
	if err != nil {
		return bad("%v", err)
	}
	defer folder.Close()
	names, err := folder.Readdirnames(-1)
	if err != nil {
		return bad("%v", err)
	}
	slices.Sort(names)
	var keys []Key
	for _, name := range names {
		if filepath.Ext(name) != ".pub" {
			continue
		}
		f := filepath.Join(dir, name)
		b, err := readTrusted(f)
		if err != nil {
			return bad("%v", err)
		}
		k := Key{File: f}
		if err := k.UnmarshalText(b); err != nil {
			return bad("%s is no minisign public key: %v", f, err)
		}
		keys = append(keys, k)
	}
	if len(keys) == 0 {
		return bad("has no key, so that no livepatch is trusted")
	}
	return keys, nil
}

func readTrusted(name string) ([]byte, error) {
	f, err := linux.OpenTrusted(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return linux.ReadAll(f, maxManifest)
}

// Check judges an artifact by itself: who signed it, whether it is whole, and what it is.
// It returns what it is as soon as that is known, and a Problem for what is wrong first.
func (a Artifact) Check(keys []Key) (m Manifest, info ModInfo, err error) {
	subject := "livepatch"
	bad := func(code maint.Code, remedy, format string, args ...any) (Manifest, ModInfo, error) {
		return m, info, maint.Problemf(code, subject, remedy, format, args...)
	}
	if err := a.vouched(keys, &m); err != nil {
		return m, info, err
	}
	if !IsModuleName(m.Name) || m.Release == "" || m.Version == "" {
		return bad(maint.CodePatchFile, "see docs/rung-a-hot-patch.md for what a manifest has", "its manifest lacks a module's name, release or version")
	}
	subject += " " + m.Name
	if err := a.whole(subject, m.Size, m.SHA256); err != nil {
		return m, info, err
	}
	info, err = ReadModInfo(a.Module)
	switch {
	case err != nil:
		return bad(maint.CodeNoLivepatch, "give an uncompressed kernel module", "%v", err)
	case !info.Livepatch:
		return bad(maint.CodeNoLivepatch, "build it as a livepatch: MODULE_INFO(livepatch, \"Y\")", "module %s is no livepatch", info.Name)
	case info.SrcVersion == "":
		return bad(maint.CodeNoLivepatch, "have it built with MODULE_VERSION, or linked with --build-id", "module %s bears neither srcversion nor build ID: nobody could tell it from another of its name", info.Name)
	case info.Name != m.Name:
		return bad(maint.CodePatchFile, "sign the manifest that is of this module", "the module is called %s", info.Name)
	}
	return m, info, nil
}

// vouched judges who has signed the manifest, and reads it.
func (a Artifact) vouched(keys []Key, manifest any) error {
	bad := func(code maint.Code, remedy, format string, args ...any) error {
		return maint.Problemf(code, "livepatch", remedy, format, args...)
	}
	var s minisign.Signature
	if err := s.UnmarshalText(a.Signature); err != nil {
		return bad(maint.CodePatchSigned, "sign the manifest: minisign -Sm FILE.toml", "its signature cannot be read: %v", err)
	}
	signed, known := false, false
	for _, k := range keys {
		known = known || k.ID() == s.KeyID
		signed = signed || minisign.Verify(k.PublicKey, a.Manifest, a.Signature)
	}
	switch {
	case !known:
		return bad(maint.CodePatchSigned, "have it signed by somebody who is trusted, or trust that key: put it into the keys' folder", "it is signed with key %016X, which is not trusted here", s.KeyID)
	case !signed:
		return bad(maint.CodePatchSigned, "fetch it again, and have its manifest signed anew if it was edited", "the signature is not that of this manifest")
	}
	d := toml.NewDecoder(strings.NewReader(string(a.Manifest))).DisallowUnknownFields()
	if err := d.Decode(manifest); err != nil {
		return bad(maint.CodePatchFile, "see docs/rung-a-hot-patch.md for what a manifest has", "its manifest cannot be read: %v", err)
	}
	return nil
}

// whole judges whether the bytes are those that were signed.
func (a Artifact) whole(subject string, size int64, sha256 string) error {
	if n := int64(len(a.Module)); n < size {
		return maint.Problemf(maint.CodePatchFile, subject, "fetch it again", "it is cut short: %d of %d bytes are there", n, size)
	}
	if sum := a.SHA256(); sum != strings.ToLower(sha256) {
		return maint.Problemf(maint.CodePatchHash, subject, "fetch it again", "its SHA-256 is %s, and was signed as %s", sum, sha256)
	}
	return nil
}

// SHA256 is the module's, hexadecimal.
func (a Artifact) SHA256() string {
	sum := sha256.Sum256(a.Module)
	return hex.EncodeToString(sum[:])
}

// Fits judges whether a livepatch is for this very kernel, and the modules that it has
// loaded. All problems are told.
func (t Tree) Fits(m Manifest, info ModInfo) (problems []maint.Problem) {
	bad := func(remedy, format string, args ...any) {
		problems = append(problems, *maint.Problemf(maint.CodeWrongKernel, "livepatch "+m.Name, remedy, format, args...))
	}
	release, version, err := t.Kernel()
	if err != nil {
		bad("see that /proc is mounted", "the running kernel cannot be told: %v", err)
		return problems
	}
	built, _, _ := strings.Cut(info.VerMagic, " ")
	const get = "get the livepatch for the kernel that runs"
	switch {
	case m.Release != release:
		bad(get, "it is for kernel %s, and %s runs", m.Release, release)
	case m.Version != version:
		bad(get, "it is for build %q of kernel %s, and %q runs", m.Version, release, version)
	}
	if built != m.Release {
		bad("have it built for the kernel that its manifest names", "its vermagic is %q, for kernel %s", info.VerMagic, built)
	}
	for name, want := range m.Modules {
		loaded, have, _ := t.Module(name)
		if loaded && have != want {
			bad(get, "it changes module %s with srcversion %s, and %s is loaded", name, want, have)
		}
	}
	return problems
}

// Describe is what is kept of a livepatch.
func Describe(m Manifest, info ModInfo) maint.KeptPatch {
	return maint.KeptPatch{Name: m.Name, SHA256: strings.ToLower(m.SHA256), SrcVersion: info.SrcVersion, Release: m.Release, Version: m.Version,
		Cumulative: m.Cumulative, Covers: m.Covers, Reboot: m.Reboot, Functions: m.Functions}
}

// Store keeps copies of livepatches, a folder for each: NAME-SHA256.
type Store struct {
	Dir string
	Ext string // of what is no kernel module: ".so"
}

func (s Store) ext() string { return cmp.Or(s.Ext, moduleExt) }

func (s Store) folder(name, sha256 string) string {
	return filepath.Join(s.Dir, name+"-"+sha256)
}

// File is where the copy of a livepatch is.
func (s Store) File(k maint.KeptPatch) string {
	return filepath.Join(s.folder(k.Name, k.SHA256), "patch"+s.ext())
}

// Read gives the copy of a livepatch.
func (s Store) Read(k maint.KeptPatch) (Artifact, error) { return readFiles(s.File(k), s.ext()) }

// Put keeps a copy, which is on disk when it returns.
func (s Store) Put(name string, a Artifact) error {
	dir := s.folder(name, a.SHA256())
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for ext, b := range map[string][]byte{s.ext(): a.Module, manifestExt: a.Manifest, signatureExt: a.Signature} {
		if err := linux.WriteFile(filepath.Join(dir, "patch"+ext), b); err != nil {
			return err
		}
	}
	return errors.Join(linux.Sync(dir), linux.Sync(s.Dir), linux.Sync(filepath.Dir(s.Dir)))
}

// Keep removes all copies but those of the livepatches given.
func (s Store) Keep(patches ...*maint.KeptPatch) error {
	entries, err := os.ReadDir(s.Dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	keep := make(map[string]bool)
	for _, k := range patches {
		if k != nil {
			keep[filepath.Base(s.folder(k.Name, k.SHA256))] = true
		}
	}
	for _, e := range entries {
		if !keep[e.Name()] {
			err = errors.Join(err, os.RemoveAll(filepath.Join(s.Dir, e.Name())))
		}
	}
	return err
}
