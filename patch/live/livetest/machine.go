// Package livetest has a kernel that takes livepatches, as far as can be told from
// outside: a folder with what a kernel shows in sysfs and /proc, which changes as a
// kernel's would. Contract says what of it can be relied on.
package livetest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/patch/live"
)

// Options are what a kernel is like.
type Options struct {
	Release, Version string
	Replace          bool          // it shows <patch>/replace
	StackOrder       bool          // it shows <patch>/stack_order
	Transition       time.Duration // how long a transition takes that nobody holds up
	Late             bool          // it can load microcode late
	CPUs             int
}

// Debian12 is a kernel 6.1, Newer one of after 6.12.
func Debian12() Options {
	return Options{Release: "6.1.0-25-amd64", Version: "#1 SMP PREEMPT_DYNAMIC Debian 6.1.106-3 (2024-08-26)", Transition: 5 * time.Millisecond, CPUs: 2}
}

// Newer is a kernel with all that kernels have come to show.
func Newer() Options {
	return Options{Release: "6.16.3", Version: "#1 SMP PREEMPT_DYNAMIC Mon Sep 1 12:00:00 UTC 2025", Replace: true, StackOrder: true,
		Transition: 5 * time.Millisecond, Late: true, CPUs: 4}
}

// Machine is a host's kernel. It implements live.Kernel, live.Witness and live.Microcode.
type Machine struct {
	live.Direct // what is only read is read as on a real host
	Options

	t        testing.TB
	mu       sync.Mutex
	patches  []*patch // in the order of their loading
	modules  map[string]string
	holders  map[int]string // tasks that hold up transitions: TID, and what they are in
	seq      int
	revision int
	boots    int
	// OnLoad, if set, is called once a livepatch has been loaded.
	OnLoad func(name string)
}

type patch struct {
	name            string
	enabled, moving bool
	replace         bool
	functions       []string // object/function
	timer           *time.Timer
}

// New makes a machine below root.
func New(t testing.TB, root string, o Options) *Machine {
	t.Helper()
	m := &Machine{Direct: live.Direct{Tree: live.Tree{Root: root}, Keys: filepath.Join(root, "etc/belay/keys")}, Options: o, t: t, holders: make(map[int]string), revision: 0x1e}
	m.Boot()
	t.Cleanup(m.stop)
	return m
}

// Root is the host's root folder.
func (m *Machine) Root() string { return m.Tree.Root }

// BootID is another after each boot.
func (m *Machine) BootID() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return fmt.Sprintf("boot-%d", m.boots)
}

func (m *Machine) stop() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range m.patches {
		p.timer.Stop()
	}
}

// Boot boots the machine (anew): nothing that was loaded is.
func (m *Machine) Boot() {
	m.t.Helper()
	if m.modules != nil {
		m.stop()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.boots++
	m.patches, m.modules, m.seq = nil, make(map[string]string), 0
	for _, dir := range []string{"sys", "proc", "dev"} {
		check(m.t, os.RemoveAll(m.path(dir)))
	}
	m.put("sys/kernel/livepatch/", "")
	m.put("sys/module/", "")
	m.put("proc/sys/kernel/osrelease", m.Release)
	m.put("proc/sys/kernel/version", m.Version)
	m.put("proc/sys/kernel/tainted", "0")
	m.put("proc/cmdline", "BOOT_IMAGE=/boot/vmlinuz root=/dev/vda1 ro quiet")
	m.put("dev/kmsg", "")
	m.say("Linux version " + m.Release)
	for tid, comm := range map[int]string{1: "systemd", 2: "kthreadd", 77: "qemu-system-x86"} {
		m.task(tid, comm, "do_sys_poll")
	}
	for tid, function := range m.holders {
		m.task(tid, fmt.Sprintf("kworker/0:%d", tid), function)
	}
	m.setStates("-1")
	m.showMicrocode()
}

func (m *Machine) path(name string) string { return filepath.Join(m.Tree.Root, name) }

// put writes a file, or makes a folder for a name that ends in /.
func (m *Machine) put(name, text string) {
	if strings.HasSuffix(name, "/") {
		check(m.t, os.MkdirAll(m.path(name), 0o755))
		return
	}
	check(m.t, os.MkdirAll(filepath.Dir(m.path(name)), 0o755))
	// A reader never finds half of it, as in sysfs.
	check(m.t, os.WriteFile(m.path(name)+"~", []byte(text+"\n"), 0o644))
	check(m.t, os.Rename(m.path(name)+"~", m.path(name)))
}

// SetCommandLine sets what the kernel was booted with.
func (m *Machine) SetCommandLine(s string) { m.put("proc/cmdline", s) }

// SetTaint sets the kernel's taint.
func (m *Machine) SetTaint(bits uint64) { m.put("proc/sys/kernel/tainted", fmt.Sprint(bits)) }

// Say has the kernel log a line.
func (m *Machine) Say(text string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.say(text)
}

func (m *Machine) say(text string) {
	m.seq++
	f, err := os.OpenFile(m.path("dev/kmsg"), os.O_APPEND|os.O_WRONLY, 0)
	check(m.t, err)
	_, err = fmt.Fprintf(f, "6,%d,%d,-;%s\n SUBSYSTEM=cpu\n", m.seq, m.seq*1000, text)
	check(m.t, err)
	check(m.t, f.Close())
}

// task shows a task. Those from 100 on are kernel threads.
func (m *Machine) task(tid int, comm, function string) {
	dir := fmt.Sprintf("proc/%d/task/%d/", tid, tid)
	m.put(dir+"comm", comm)
	m.put(dir+"stack", fmt.Sprintf("[<0>] %s+0x1b/0x60\n[<0>] kthread+0xd6/0x100\n[<0>] ret_from_fork+0x1f/0x30", function))
	statm := "9 8 7 1 0 3 0"
	if tid >= 100 {
		statm = "0 0 0 0 0 0 0"
	}
	m.put(fmt.Sprintf("proc/%d/statm", tid), statm)
	m.put(dir+"patch_state", "-1")
}

// Hold has a kernel thread hold up every transition, asleep in a function.
func (m *Machine) Hold(tid int, function string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.holders[tid] = function
	m.task(tid, fmt.Sprintf("kworker/0:%d", tid), function)
}

// LetGo lets the transition go on that a thread has held up.
func (m *Machine) LetGo(tid int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.holders, tid)
	check(m.t, os.RemoveAll(m.path(fmt.Sprintf("proc/%d", tid))))
	for _, p := range m.patches {
		if p.moving {
			p.timer.Reset(m.Transition)
		}
	}
}

// setStates sets every task's patch_state but those of holders.
func (m *Machine) setStates(to string) {
	dirs, err := filepath.Glob(m.path("proc/[0-9]*"))
	check(m.t, err)
	for _, d := range dirs {
		tid := filepath.Base(d)
		state := to
		for holder := range m.holders {
			if fmt.Sprint(holder) == tid && to != "-1" {
				state = "0" // it goes on with the old code
			}
		}
		m.put(fmt.Sprintf("proc/%s/task/%s/patch_state", tid, tid), state)
	}
}

// modInfo reads "key=value" entries.
func modInfo(module []byte, key string) (values []string) {
	for e := range strings.SplitSeq(string(module), "\x00") {
		if v, found := strings.CutPrefix(e, key+"="); found {
			values = append(values, v)
		}
	}
	return values
}

// Load implements live.Kernel with the kernel's own checks.
func (m *Machine) Load(_ context.Context, a live.Artifact) error {
	info, err := live.ReadModInfo(a.Module)
	if err != nil || !strings.HasPrefix(info.VerMagic, m.Release+" ") {
		return os.NewSyscallError("init_module", unix.ENOEXEC)
	}
	name, err := m.load(a, info)
	if err != nil {
		return os.NewSyscallError("init_module", err)
	}
	if m.OnLoad != nil {
		m.OnLoad(name)
	}
	return nil
}

func (m *Machine) load(a live.Artifact, info live.ModInfo) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, there := m.modules[info.Name]; there {
		return "", unix.EEXIST
	}
	if m.moving() {
		return "", unix.EBUSY
	}
	m.modules[info.Name] = info.SrcVersion
	dir := "sys/module/" + info.Name + "/"
	m.put(dir+"srcversion", info.SrcVersion)
	m.put(dir+"taint", "OEK")
	m.put(dir+"refcnt", "1")
	m.put(dir+"initstate", "live")
	if !info.Livepatch {
		m.put(dir+"taint", "OE")
		return info.Name, nil
	}
	p := &patch{name: info.Name, enabled: true, moving: true, functions: modInfo(a.Module, "x_function"), replace: slices.Contains(modInfo(a.Module, "x_replace"), "Y")}
	m.patches = append(m.patches, p)
	m.say("livepatch: enabling patch '" + p.name + "'")
	dir = "sys/kernel/livepatch/" + p.name + "/"
	for _, f := range p.functions {
		object, function, _ := strings.Cut(f, "/")
		m.put(dir+object+"/"+function+",1/", "")
		m.put(dir+object+"/patched", "1")
	}
	m.put(dir+"force", "")
	if m.Replace {
		m.put(dir+"replace", bit(p.replace))
	}
	m.show(p)
	m.stack()
	m.setStates("1")
	p.timer = time.AfterFunc(m.Transition, func() { m.settle(p) })
	return p.name, nil
}

func bit(b bool) string {
	if b {
		return "1"
	}
	return "0"
}

func (m *Machine) moving() bool {
	return slices.ContainsFunc(m.patches, func(p *patch) bool { return p.moving })
}

// show writes what changes of a livepatch; enabled comes last, as it is what one looks for.
func (m *Machine) show(p *patch) {
	dir := "sys/kernel/livepatch/" + p.name + "/"
	m.put(dir+"transition", bit(p.moving))
	m.put(dir+"enabled", bit(p.enabled))
}

func (m *Machine) stack() {
	for i, p := range m.patches {
		if m.StackOrder {
			m.put("sys/kernel/livepatch/"+p.name+"/stack_order", fmt.Sprint(i+1))
		}
	}
}

// settle ends a transition that nobody holds up.
func (m *Machine) settle(p *patch) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !p.moving || !slices.Contains(m.patches, p) || p.enabled && len(m.holders) > 0 {
		return
	}
	p.moving = false
	m.setStates("-1")
	if !p.enabled {
		m.say("livepatch: '" + p.name + "': unpatching complete")
		m.remove(p)
		return
	}
	m.say("livepatch: '" + p.name + "': patching complete")
	if p.replace {
		for _, old := range slices.Clone(m.patches) {
			if old != p {
				m.remove(old)
			}
		}
	}
	m.show(p)
}

// remove takes a livepatch out of sysfs; its module stays.
func (m *Machine) remove(p *patch) {
	m.patches = slices.DeleteFunc(m.patches, func(x *patch) bool { return x == p })
	check(m.t, os.RemoveAll(m.path("sys/kernel/livepatch/"+p.name)))
	m.put("sys/module/"+p.name+"/refcnt", "0")
	m.stack()
}

// Enable implements live.Kernel as enabled_store() of kernel/livepatch/core.c.
func (m *Machine) Enable(_ context.Context, name string, on bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	i := slices.IndexFunc(m.patches, func(p *patch) bool { return p.name == name })
	if i < 0 {
		return &os.PathError{Op: "open", Path: name, Err: unix.ENOENT}
	}
	p := m.patches[i]
	switch {
	case p.enabled == on:
		return unix.EINVAL
	case p.moving: // it is turned round
	case on:
		return unix.EINVAL
	case m.moving():
		return unix.EBUSY
	}
	p.enabled, p.moving = on, true
	m.show(p)
	m.setStates(bit(on))
	p.timer.Reset(m.Transition)
	return nil
}

// Unload implements live.Kernel.
func (m *Machine) Unload(_ context.Context, name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, there := m.modules[name]
	switch {
	case !there:
		return os.NewSyscallError("delete_module", unix.ENOENT)
	case slices.ContainsFunc(m.patches, func(p *patch) bool { return p.name == name }):
		return os.NewSyscallError("delete_module", unix.EWOULDBLOCK)
	}
	delete(m.modules, name)
	check(m.t, os.RemoveAll(m.path("sys/module/"+name)))
	return nil
}

// Tasks implements live.Witness.
func (m *Machine) Tasks(ctx context.Context, functions []string) ([]maint.KernelTask, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.Direct.Tasks(ctx, functions)
}

// ReloadMicrocode implements live.Microcode.
func (m *Machine) ReloadMicrocode(context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.Late {
		return &os.PathError{Op: "open", Path: "reload", Err: unix.ENOENT}
	}
	m.revision++
	m.showMicrocode()
	return nil
}

func (m *Machine) showMicrocode() {
	if m.Late {
		m.put("sys/devices/system/cpu/microcode/reload", "")
	}
	for cpu := range m.CPUs {
		m.put(fmt.Sprintf("sys/devices/system/cpu/cpu%d/microcode/version", cpu), fmt.Sprintf("%#x", m.revision))
	}
}

// Loaded names what is loaded as people would: "a", "a+b", with "*" in transition and
// "-" disabled; and in brackets the modules that no livepatch has any more.
func (m *Machine) Loaded() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var words, rest []string
	for _, p := range m.patches {
		word := p.name
		if !p.enabled {
			word = "-" + word
		}
		if p.moving {
			word += "*"
		}
		words = append(words, word)
	}
	for name := range m.modules {
		if !slices.ContainsFunc(m.patches, func(p *patch) bool { return p.name == name }) {
			rest = append(rest, name)
		}
	}
	text := strings.Join(words, "+")
	if len(rest) > 0 {
		slices.Sort(rest)
		text += "(" + strings.Join(rest, " ") + ")"
	}
	return text
}

// SetMicrocode has one CPU show another revision.
func (m *Machine) SetMicrocode(cpu int, revision string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.put(fmt.Sprintf("sys/devices/system/cpu/cpu%d/microcode/version", cpu), revision)
}
