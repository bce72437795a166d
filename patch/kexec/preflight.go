package kexec

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
)

const (
	host = "this host"
	// stateRoom is what a guest takes beside its memory: the state of its devices, and its
	// video memory.
	stateRoom = 64 << 20
)

// judgement collects what stands in the way.
type judgement struct{ problems []maint.Problem }

func (g *judgement) add(code maint.Code, subject, remedy, reason string, args ...any) {
	g.problems = append(g.problems, *maint.Problemf(code, subject, remedy, reason, args...))
}

// Plan says what the job would do, and all that stands in its way. It changes nothing.
func (j *Job) Plan(ctx context.Context) (maint.KexecPlan, error) {
	v, _, err := j.survey(ctx)
	return v, err
}

// Preflight returns a *maint.Refusal with all that stands in the way, or writes the plan down.
func (j *Job) Preflight(ctx context.Context, s Scratch) error {
	v, pl, err := j.survey(ctx)
	if err != nil {
		return err
	}
	if err := maint.Refuse("cannot start another kernel under the guests of this host", v.Problems); err != nil {
		return err
	}
	for i, g := range pl.Guests {
		if now, err := j.Host.Guest(ctx, g.UUID); err == nil {
			pl.Guests[i].BootID = j.Inside.BootID(ctx, now)
		}
	}
	return s.Save(pl)
}

func (j *Job) survey(ctx context.Context) (v maint.KexecPlan, pl plan, err error) {
	var g judgement
	if pl.Boot, err = j.Tree.Boot(); err != nil {
		return v, pl, err
	}
	if pl.Old.Release, err = j.Tree.Release(); err != nil {
		return v, pl, err
	}
	if pl.Old.Cmdline, err = j.Tree.Cmdline(); err != nil {
		return v, pl, err
	}
	pl.New = maint.KernelImage{Kernel: j.Request.Kernel, Initrd: j.Request.Initrd, Cmdline: j.Request.Append}
	if pl.New.Cmdline == "" {
		pl.New.Cmdline = pl.Old.Cmdline
	}
	j.Tree.wayBack(&g, &pl.Old)
	j.Tree.fit(&g, &pl.New)
	j.Tree.cmdline(&g, pl.Old.Cmdline, pl.New.Cmdline)
	m, err := readManifest(j.dir())
	if p := j.damaged(err); p != nil {
		g.problems = append(g.problems, *p)
	} else if err == nil && m.Op != j.Op && !m.settled(j.dir()) {
		g.problems = append(g.problems, *j.unsettled(m))
	}
	if err := unix.Access(j.dir(), unix.W_OK|unix.X_OK); err != nil && j.Tree.OnPmem(j.Dir) == "" {
		g.add(maint.CodeNoRegion, host, "put it into ReadWritePaths= of belayd.service (systemctl edit belayd), and have it mounted read-write", "%s cannot be written to by belayd: %v", j.Dir, err)
	}
	if owner := j.Tree.exposed(j.Dir); owner != "" {
		g.add(maint.CodeNoRegion, host, "chown root:root "+j.Dir+", chmod 755 "+j.Dir+"; memory_backing_dir (qemu.conf) must not be a mount of it under /var/lib/libvirt/qemu/ram, which libvirt gives to QEMU's user", "%s can be written to by %s, who could replace what is kept there", j.Dir, owner)
	}
	ways, err := j.guests(ctx, &g, &pl)
	if err != nil {
		return v, pl, err
	}
	v = maint.KexecPlan{Old: pl.Old, New: pl.New, Dir: j.Dir, Guests: ways}
	for _, w := range ways {
		v.NeedBytes += w.Bytes
	}
	g.problems = append(j.Tree.Missing(j.Dir, v.NeedBytes), g.problems...)
	if v.FreeBytes, err = j.free(); err == nil && v.NeedBytes > v.FreeBytes {
		g.add(maint.CodeNoRoom, host, "reserve more, or move guests away first (belay migrate)",
			"%d MiB are free in %s, and the guests need %d MiB", v.FreeBytes>>20, j.Dir, v.NeedBytes>>20)
	}
	v.Problems = append([]maint.Problem{}, g.problems...)
	return v, pl, nil
}

// Needs is what a guest with so much memory takes when it is saved, bytes.
func Needs(memory uint64) uint64 { return memory + memory/50 + stateRoom }

// free is the room there will be when what an earlier operation has left is gone.
func (j *Job) free() (uint64, error) {
	n, err := room(j.dir())
	if err != nil {
		return 0, err
	}
	if m, err := readManifest(j.dir()); err == nil && m.settled(j.dir()) {
		for _, e := range m.Guests {
			for _, ext := range []string{saveExt, lostExt} {
				if info, err := os.Stat(filepath.Join(j.dir(), e.UUID+ext)); err == nil {
					n += uint64(info.Size())
				}
			}
		}
	}
	return n, nil
}

// Missing is what this host lacks for any new kernel under its guests, which need so many
// bytes of reserved memory.
func (t Tree) Missing(dir string, need uint64) []maint.Problem {
	var g judgement
	cmdline, err := t.Cmdline()
	if err != nil {
		g.add(maint.CodeFailed, host, "see that /proc is mounted", "%v", err)
	}
	regions := Reserved(cmdline)
	if len(regions) == 0 {
		g.add(maint.CodeNoRegion, host, t.reserve(need), "keeps no memory over a boot: its kernel was started without memmap=SIZE!START; guests that run need %d MiB", need>>20)
	}
	ram := t.RAM()
	for _, r := range regions {
		if !Within(ram, r) {
			g.add(maint.CodeNoRegion, host, "choose memory that is there (/sys/firmware/memmap), above 4 GiB: below it machines have a hole",
				"memmap=%s is not memory: what is written there is lost", r)
		}
	}
	if why := t.OnPmem(dir); why != "" && len(regions) > 0 {
		g.add(maint.CodeNoRegion, host, fmt.Sprintf("mkdir -p -m 700 %s; in /etc/fstab: %s; systemctl daemon-reload; systemctl start '%s'", dir, fstabLine(dir), unitOf(dir)), "%s", why)
	} else if len(regions) > 0 && !t.mountsAtBoot(dir) {
		g.add(maint.CodeNoRegion, host, "in /etc/fstab: "+fstabLine(dir),
			"%s is mounted, but would not be after a boot", dir)
	}
	t.kexecs(&g)
	const unit = "libvirt-guests.service"
	if t.exists("/run/systemd/units/invocation:" + unit) {
		g.add(maint.CodeGuestsUnit, host, "systemctl disable "+unit+", and mask it; do not stop it: that would shut guests down (systemctl mask "+unit+", then boot once without guests)",
			"%s is active: it shuts guests down when the host goes down", unit)
	} else if wanted, _ := filepath.Glob(t.at("/etc/systemd/system/*.wants/" + unit)); len(wanted) > 0 && !t.masked(unit) {
		g.add(maint.CodeGuestsUnit, host, "systemctl mask "+unit, "%s is enabled: it starts guests by itself when the host is up", unit)
	}
	return g.problems
}

// fstabLine has the reserved memory mounted, after a file system was made where there is none:
// a power cut takes it along.
func fstabLine(dir string) string {
	return "/dev/pmem0 " + dir + " ext4 dax,nofail,x-systemd.makefs,x-systemd.device-timeout=90s 0 0"
}

// reserve tells how to reserve memory for so many bytes, and 10 % more: the file system takes some.
func (t Tree) reserve(need uint64) string {
	r, ok := Advise(t.RAM(), max(need+need/10, 1<<30))
	if !ok {
		return "add memory, or have fewer guests: no memory above 4 GiB is large enough, and below it machines have a hole"
	}
	return fmt.Sprintf(`in /etc/default/grub: GRUB_CMDLINE_LINUX="... memmap=%s", update-grub, and boot; then see docs/rung-b-kexec.md`, r)
}

// mountsAtBoot reports whether systemd mounts something on a folder when the host boots.
func (t Tree) mountsAtBoot(dir string) bool {
	fstab, _ := t.text("/etc/fstab")
	for line := range strings.Lines(fstab) {
		f := strings.Fields(line)
		if len(f) > 1 && !strings.HasPrefix(f[0], "#") && f[1] == dir {
			return true
		}
	}
	return t.exists("/etc/systemd/system/" + unitOf(dir))
}

// unitOf is the mount unit of a folder (systemd-escape(1), for plain paths).
func unitOf(dir string) string {
	return strings.ReplaceAll(strings.ReplaceAll(strings.Trim(dir, "/"), "-", `\x2d`), "/", "-") + ".mount"
}

func (t Tree) masked(unit string) bool {
	to, err := os.Readlink(t.at("/etc/systemd/system/" + unit))
	return err == nil && to == "/dev/null"
}

// kexecLoaded has "1" while a kernel is loaded that is to be started in this one's place.
const kexecLoaded = "/sys/kernel/kexec_loaded"

// kexecs: this kernel can start another.
func (t Tree) kexecs(g *judgement) {
	if _, err := t.text(kexecLoaded); err != nil {
		g.add(maint.CodeKexec, host, "boot a kernel with CONFIG_KEXEC_FILE=y", "its kernel has no kexec: %v", err)
	}
	if s, _ := t.text("/proc/sys/kernel/kexec_load_disabled"); s == "1" {
		g.add(maint.CodeKexec, host, "find who sets kernel.kexec_load_disabled, and boot without it", "kexec is switched off until the next boot")
	}
	if s, err := t.text("/sys/kernel/security/lockdown"); err == nil && !strings.Contains(s, "[none]") {
		g.add(maint.CodeKexec, host, "sign the kernel with a key that this one trusts, or boot without lockdown", "the kernel is locked down: %s", s)
	}
	release, _ := t.Release()
	if config, err := t.text("/boot/config-" + release); err == nil && !strings.Contains(config, "CONFIG_KEXEC_FILE=y") {
		g.add(maint.CodeKexec, host, "boot a kernel with CONFIG_KEXEC_FILE=y", "its kernel was built without kexec_file_load")
	}
}

// wayBack finds the image of the kernel that runs, which is started again where the new one
// is not well, and sees that the boot loader would bring it with the same memory.
func (t Tree) wayBack(g *judgement, old *maint.KernelImage) {
	k := t.Image(old.Release)
	for _, f := range []struct{ what, path string }{{"image", k.Kernel}, {"initrd", k.Initrd}} {
		if f.path == "" {
			g.add(maint.CodeNoWayBack, host, "install the package of the kernel that runs again", "the %s of the kernel that runs, %s, is not in /boot: it could not be started again", f.what, old.Release)
		}
	}
	old.Kernel, old.Initrd = k.Kernel, k.Initrd
	grub, err := t.text("/boot/grub/grub.cfg")
	if err != nil {
		return // another boot loader
	}
	for _, r := range Reserved(old.Cmdline) {
		if !slices.Contains(Reserved(strings.NewReplacer(`\`, "", `'`, " ", `"`, " ").Replace(grub)), r) {
			g.add(maint.CodeNoWayBack, host, "put it into GRUB_CMDLINE_LINUX in /etc/default/grub, and run update-grub",
				"the boot loader would start kernels without memmap=%s: after a panic the guests' memory would be overwritten", r)
		}
	}
}

// needed are the modules by which a kernel finds the reserved memory, and the settings that
// build them.
var needed = []struct{ module, setting string }{
	{"nd_e820", "CONFIG_X86_PMEM_LEGACY"}, {"nd_pmem", "CONFIG_BLK_DEV_PMEM"}, {"dax", "CONFIG_DAX"}, {"ext4", "CONFIG_EXT4_FS"},
}

// fit: the new kernel and its initrd are what they should be.
func (t Tree) fit(g *judgement, k *maint.KernelImage) {
	subject := "kernel " + k.Kernel
	var err error
	if k.Release, err = t.release(k.Kernel); err != nil {
		g.add(maint.CodeImage, subject, "name the image of a kernel for x86, such as /boot/vmlinuz-6.1.0-28-amd64", "%v", err)
	}
	if head, err := t.head(k.Initrd); err != nil {
		g.add(maint.CodeImage, "initrd "+k.Initrd, "name the kernel's initrd, such as /boot/initrd.img-6.1.0-28-amd64", "%v", err)
	} else if !slices.ContainsFunc(archives, func(magic string) bool { return bytes.HasPrefix(head, []byte(magic)) }) {
		g.add(maint.CodeImage, "initrd "+k.Initrd, "make it anew (update-initramfs -c -k "+k.Release+")", "is no initrd: it begins with %x", head)
	}
	if k.Release == "" {
		return
	}
	dep, err := t.text("/lib/modules/" + k.Release + "/modules.dep")
	if err != nil {
		g.add(maint.CodeImage, subject, "install its package", "its modules are not here: %v", err)
		return
	}
	builtin, _ := t.text("/lib/modules/" + k.Release + "/modules.builtin")
	config, configErr := t.text("/boot/config-" + k.Release)
	for _, n := range needed {
		has := hasModule(dep, n.module) || hasModule(builtin, n.module)
		if configErr == nil {
			has = has || strings.Contains(config, n.setting+"=y")
		}
		if !has {
			g.add(maint.CodeImage, subject, "use one that is built with it", "has no %s (%s): it would not find the reserved memory", n.module, n.setting)
		}
	}
	if configErr == nil && !strings.Contains(config, "CONFIG_FS_DAX=y") {
		g.add(maint.CodeImage, subject, "use one that is built with it", "has no CONFIG_FS_DAX")
	}
}

// hasModule looks for a module in a modules.dep or modules.builtin; both spell "-" and "_" alike.
func hasModule(list, name string) bool {
	for line := range strings.Lines(list) {
		path, _, _ := strings.Cut(strings.TrimSpace(line), ":")
		base, _, _ := strings.Cut(filepath.Base(path), ".ko")
		if strings.ReplaceAll(base, "-", "_") == name {
			return true
		}
	}
	return false
}

// archives are how an initrd begins: cpio, gzip, zstd, xz, lz4, bzip2, lzo.
var archives = []string{"070701", "\x1f\x8b", "\x28\xb5\x2f\xfd", "\xfd7zXZ", "\x02\x21\x4c\x18", "BZh", "\x89LZO"}

func (t Tree) head(path string) ([]byte, error) {
	f, err := os.Open(t.at(path))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	head := make([]byte, 8)
	n, err := f.Read(head)
	if n == 0 && err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return head[:n], nil
}

// cmdline: the new kernel finds the same memory, and the same root.
func (t Tree) cmdline(g *judgement, old, new string) {
	const subject = "command line"
	if a, b := Reserved(old), Reserved(new); !slices.Equal(a, b) {
		g.add(maint.CodeCmdline, subject, "carry the same memmap= over, or leave --append out", "the new kernel would reserve %v, and this one has %v", b, a)
	}
	if a, b := parameter(old, "root"), parameter(new, "root"); a != b {
		g.add(maint.CodeCmdline, subject, "carry the same root= over, or leave --append out", "the new kernel would have root=%s, and this one has root=%s", b, a)
	}
}

func parameter(cmdline, name string) (value string) {
	for _, w := range strings.Fields(cmdline) {
		if v, ok := strings.CutPrefix(w, name+"="); ok {
			value = v
		}
	}
	return value
}
