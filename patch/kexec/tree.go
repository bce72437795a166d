package kexec

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
)

// Tree is the host's files below Root, "" for its own root folder.
type Tree struct{ Root string }

func (t Tree) at(path string) string { return filepath.Join("/", t.Root, path) }

func (t Tree) text(path string) (string, error) {
	b, err := os.ReadFile(t.at(path))
	return strings.TrimSpace(string(b)), err
}

func (t Tree) exists(path string) bool {
	_, err := os.Stat(t.at(path))
	return err == nil
}

// Boot is the host's boot ID (/proc/sys/kernel/random/boot_id).
func (t Tree) Boot() (string, error) { return t.text("/proc/sys/kernel/random/boot_id") }

// Release is uname -r (/proc/sys/kernel/osrelease).
func (t Tree) Release() (string, error) { return t.text("/proc/sys/kernel/osrelease") }

// Uptime is how long ago the kernel was started (/proc/uptime).
func (t Tree) Uptime() (time.Duration, error) {
	s, err := t.text("/proc/uptime")
	if err != nil {
		return 0, err
	}
	seconds, _, _ := strings.Cut(s, " ")
	return time.ParseDuration(seconds + "s")
}

// Cmdline is /proc/cmdline without what the boot loader and kexec put there for themselves.
func (t Tree) Cmdline() (string, error) {
	s, err := t.text("/proc/cmdline")
	words := slices.DeleteFunc(strings.Fields(s), func(w string) bool {
		return strings.HasPrefix(w, "BOOT_IMAGE=") || strings.HasPrefix(w, "initrd=")
	})
	return strings.Join(words, " "), err
}

// Region is a range of physical addresses.
type Region struct{ Start, Size uint64 }

func (r Region) String() string { return fmt.Sprintf("%s!%s", amount(r.Size), amount(r.Start)) }

// amount is a size as the kernel's command line has it.
func amount(n uint64) string {
	for _, u := range []struct {
		shift uint
		name  string
	}{{30, "G"}, {20, "M"}, {10, "K"}} {
		if n > 0 && n%(1<<u.shift) == 0 {
			return strconv.FormatUint(n>>u.shift, 10) + u.name
		}
	}
	return fmt.Sprintf("%#x", n)
}

// Reserved are the regions that a command line keeps as persistent memory (memmap=nn[KMG]!ss[KMG],
// Documentation/admin-guide/kernel-parameters.txt), in order.
func Reserved(cmdline string) (regions []Region) {
	for _, w := range strings.Fields(cmdline) {
		list, found := strings.CutPrefix(w, "memmap=")
		for _, one := range strings.Split(list, ",") {
			size, start, is := strings.Cut(one, "!")
			if !found || !is {
				continue
			}
			n, err := memparse(size)
			at, err2 := memparse(start)
			if err == nil && err2 == nil {
				regions = append(regions, Region{at, n})
			}
		}
	}
	slices.SortFunc(regions, func(a, b Region) int { return int(a.Start>>12) - int(b.Start>>12) })
	return regions
}

// memparse reads a number as the kernel's memparse does.
func memparse(s string) (uint64, error) {
	shift := 0
	if i := strings.IndexAny(s, "kKmMgGtT"); i >= 0 && i == len(s)-1 {
		shift = 10 * (1 + strings.IndexByte("KMGT", strings.ToUpper(s)[i]))
		s = s[:i]
	}
	n, err := strconv.ParseUint(s, 0, 64)
	if err == nil && n<<shift>>shift != n {
		err = strconv.ErrRange
	}
	return n << shift, err
}

// RAM is the memory that the firmware has told of (/sys/firmware/memmap); nil: it is not known.
func (t Tree) RAM() (ram []Region) {
	dirs, _ := filepath.Glob(t.at("/sys/firmware/memmap/*"))
	for _, dir := range dirs {
		what := func(name string) string {
			b, _ := os.ReadFile(filepath.Join(dir, name))
			return strings.TrimSpace(string(b))
		}
		start, err := strconv.ParseUint(what("start"), 0, 64)
		end, err2 := strconv.ParseUint(what("end"), 0, 64)
		if what("type") == "System RAM" && err == nil && err2 == nil {
			ram = append(ram, Region{start, end - start + 1})
		}
	}
	slices.SortFunc(ram, func(a, b Region) int { return int(a.Start>>12) - int(b.Start>>12) })
	return ram
}

// Advise is a region for so many bytes: at the end of the last memory, above 4 GiB, where no
// hole of the machine's is. ok is false where there is no such memory.
func Advise(ram []Region, bytes uint64) (r Region, ok bool) {
	const align, low = 1 << 30, 4 << 30
	size := (bytes + align - 1) / align * align
	for _, m := range slices.Backward(ram) {
		if end := (m.Start + m.Size) / align * align; end >= size && end-size >= max(m.Start, low) {
			return Region{end - size, size}, true
		}
	}
	return Region{}, false
}

// Within reports whether a region is memory; true where nothing is known.
func Within(ram []Region, r Region) bool {
	return len(ram) == 0 || slices.ContainsFunc(ram, func(m Region) bool {
		return r.Start >= m.Start && r.Start-m.Start <= m.Size && r.Size <= m.Size-(r.Start-m.Start)
	})
}

// Mount is a mounted file system.
type Mount struct {
	Point, Source, Type string
	Device, Root        string // the file system's number, and the folder of it that is at Point
	DAX                 bool
}

// Mount gives the one that a path is on (/proc/self/mountinfo).
func (t Tree) Mount(path string) (found Mount, err error) {
	s, err := t.text("/proc/self/mountinfo")
	if err != nil {
		return found, err
	}
	for line := range strings.Lines(s) {
		own, fs, ok := strings.Cut(line, " - ")
		left, right := strings.Fields(own), strings.Fields(fs)
		if !ok || len(left) < 6 || len(right) < 3 {
			continue
		}
		m := Mount{Point: unescape(left[4]), Type: right[0], Source: unescape(right[1]), Device: left[2], Root: unescape(left[3])}
		for _, o := range strings.Split(left[5]+","+right[2], ",") {
			m.DAX = m.DAX || o == "dax" || o == "dax=always"
		}
		inside := m.Point == "/" || path == m.Point || strings.HasPrefix(path, m.Point+"/")
		if inside && len(m.Point) >= len(found.Point) { // a later one covers it
			found = m
		}
	}
	return found, nil
}

func unescape(s string) string { return strings.NewReplacer(`\040`, " ", `\134`, `\`).Replace(s) }

// OnPmem says why a folder does not keep its files over a boot; "": it does.
func (t Tree) OnPmem(dir string) string {
	m, err := t.Mount(dir)
	switch {
	case err != nil:
		return err.Error()
	case m.Point != dir:
		return "no file system is mounted on " + dir
	case !strings.HasPrefix(filepath.Base(m.Source), "pmem"):
		return fmt.Sprintf("what is mounted on %s is %s, not reserved memory (/dev/pmem0)", dir, m.Source)
	case !m.DAX:
		return dir + " is not mounted with -o dax: its files would be in the page cache, too"
	}
	return ""
}

// room is what is free in a folder, bytes.
func room(dir string) (uint64, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return 0, fmt.Errorf("%s: %w", dir, err)
	}
	return fs.Bavail * uint64(fs.Bsize), nil
}

// Image is what a kernel of a release is started from: its image and initrd in /boot, "" what
// is not there.
func (t Tree) Image(release string) (k maint.KernelImage) {
	first := func(names ...string) string {
		for _, n := range names {
			if t.exists(n) {
				return n
			}
		}
		return ""
	}
	k.Kernel = first("/boot/vmlinuz-" + release)
	k.Initrd = first("/boot/initrd.img-"+release, "/boot/initramfs-"+release, "/boot/initramfs-"+release+".img")
	return k
}

// release reads uname -r out of a kernel's image (Documentation/arch/x86/boot.rst: "HdrS",
// kernel_version).
func (t Tree) release(image string) (string, error) {
	f, err := os.Open(t.at(image))
	if err != nil {
		return "", err
	}
	defer f.Close()
	head := make([]byte, 64<<10)
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		return "", fmt.Errorf("%s: %w", image, err)
	}
	head = head[:n]
	if len(head) < 0x210 || string(head[0x202:0x206]) != "HdrS" {
		return "", fmt.Errorf("%s is no bzImage", image)
	}
	at := int(binary.LittleEndian.Uint16(head[0x20e:])) + 0x200
	if at >= len(head) {
		return "", fmt.Errorf("%s does not say its release", image)
	}
	text, _, _ := bytes.Cut(head[at:], []byte{0})
	word, _, _ := strings.Cut(string(text), " ")
	if word == "" {
		return "", fmt.Errorf("%s does not say its release", image)
	}
	return word, nil
}

// Newer are the ways of later kernels to keep memory over a kexec that this one has: KHO
// (CONFIG_KEXEC_HANDOVER, Linux 6.16), LUO (Linux 6.19).
func (t Tree) Newer() (ways []string) {
	release, _ := t.Release()
	config, _ := t.text("/boot/config-" + release)
	if t.exists("/sys/kernel/debug/kho") || strings.Contains(config, "CONFIG_KEXEC_HANDOVER=y") {
		ways = append(ways, "kexec handover (KHO)")
	}
	if t.exists("/dev/liveupdate") {
		ways = append(ways, "live update (/dev/liveupdate)")
	}
	return ways
}
