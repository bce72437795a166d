package live

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
)

// ModInfo is what a module says of itself: the section .modinfo, as of modinfo(8).
type ModInfo struct {
	Name     string
	VerMagic string // "6.1.0-25-amd64 SMP preempt mod_unload modversions "
	// SrcVersion is the module's, or its build ID in hexadecimal: without
	// CONFIG_MODULE_SRCVERSION_ALL only modules with MODULE_VERSION bear a srcversion.
	SrcVersion string
	Depends    []string
	Livepatch  bool
}

// ReadModInfo reads it from an ELF file, which it does not trust.
func ReadModInfo(module []byte) (info ModInfo, err error) {
	f, err := elf.NewFile(bytes.NewReader(module))
	if err != nil {
		return info, fmt.Errorf("it is no ELF file: %w", err)
	}
	if f.Type != elf.ET_REL {
		return info, errors.New("it is no kernel module: not relocatable")
	}
	section := f.Section(".modinfo")
	if section == nil {
		return info, errors.New("it is no kernel module: it has no section .modinfo")
	}
	data, err := section.Data()
	if err != nil {
		return info, fmt.Errorf("its section .modinfo cannot be read: %w", err)
	}
	for entry := range strings.SplitSeq(string(data), "\x00") {
		key, value, _ := strings.Cut(entry, "=")
		switch key {
		case "name":
			info.Name = value
		case "vermagic":
			info.VerMagic = value
		case "srcversion":
			info.SrcVersion = value
		case "livepatch":
			info.Livepatch = value == "Y"
		case "depends":
			if value != "" {
				info.Depends = strings.Split(value, ",")
			}
		}
	}
	if notes := f.Section(buildIDNote); notes != nil && info.SrcVersion == "" {
		data, err := notes.Data()
		if err != nil {
			return info, fmt.Errorf("its section %s cannot be read: %w", buildIDNote, err)
		}
		info.SrcVersion = buildID(data)
	}
	if info.Name == "" || info.VerMagic == "" {
		return info, errors.New("it is no kernel module: it tells no name or vermagic")
	}
	return info, nil
}

// buildIDNote is the section, and the file in /sys/module/<name>/notes, of the linker's note.
const buildIDNote = ".note.gnu.build-id"

// buildID reads the note: the sizes of its name and of the ID, its type, its name, the ID.
func buildID(note []byte) string {
	const sizes, name = 12, "GNU\x00"
	if len(note) < sizes+len(name) || string(note[sizes:sizes+len(name)]) != name {
		return ""
	}
	id := note[sizes+len(name):]
	return hex.EncodeToString(id[:min(uint64(len(id)), uint64(binary.LittleEndian.Uint32(note[4:])))])
}
