package agent

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/coreos/go-systemd/v22/util"
	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/patch/leash/launch"
)

// doctorB says what is missing for rung B.
func (a *Agent) doctorB(context.Context) []maint.Check {
	return []maint.Check{a.checkLeash(), a.checkSteps(), a.checkRunDir(), a.checkAgents(), a.checkHook(), a.checkMemory(), a.checkElsewhere()}
}

// checkLeash looks for the leash's program and says how it is started.
func (a *Agent) checkLeash() maint.Check {
	c := maint.Check{Rung: "B", Name: "leash", Result: maint.CheckOK}
	program := a.cfg.Hold.Leash
	if program == "" {
		found, err := launch.Program()
		if err != nil {
			c.Result, c.Text, c.Remedy = maint.CheckFail, "its program is not there, no guest can be held: "+err.Error(),
				"install belay-leash beside belayd, or set hold.leash"
			return c
		}
		program = found
	}
	if _, err := exec.LookPath(program); err != nil {
		c.Result, c.Text, c.Remedy = maint.CheckFail, "no guest can be held: "+err.Error(), "install belay-leash there, or set hold.leash"
		return c
	}
	c.Text = program + ", started by systemd in a unit of its own"
	defer func() {
		if c.Result == maint.CheckOK && a.cfg.Hold.KillLibvirt.Duration == 0 {
			c.Text += "; a libvirtd that hangs, alive, keeps guests from it (hold.kill_libvirt is not set)"
		}
	}()
	if !util.IsRunningSystemd() {
		c.Result, c.Text = maint.CheckWarn, program+", started as belayd's child: without systemd nobody starts it again when it dies together with belayd"
		c.Remedy = "run belayd under systemd"
	}
	return c
}

func (a *Agent) checkSteps() maint.Check {
	c := maint.Check{Rung: "B", Name: "host steps", Result: maint.CheckOK, Text: "commands in units of their own, and jobs of units"}
	if !util.IsRunningSystemd() {
		c.Result, c.Text, c.Remedy = maint.CheckWarn, "commands only: systemd does not run here", "run belayd under systemd to have jobs of units (--unit)"
	}
	return c
}

// checkRunDir: what is written there within a pause must not wait for a disk.
func (a *Agent) checkRunDir() maint.Check {
	c := maint.Check{Rung: "B", Name: "run folder", Result: maint.CheckOK}
	var fs unix.Statfs_t
	dir := a.cfg.RunDir
	err := unix.Statfs(dir, &fs)
	if os.IsNotExist(err) { // it is made when it is needed
		dir = "/" + strings.SplitN(strings.TrimPrefix(dir, "/"), "/", 2)[0]
		err = unix.Statfs(dir, &fs)
	}
	switch {
	case err != nil:
		c.Result, c.Text, c.Remedy = maint.CheckFail, fmt.Sprintf("%s: %v", dir, err), "make the folder, on a tmpfs"
	case fs.Type != unix.TMPFS_MAGIC && fs.Type != unix.RAMFS_MAGIC:
		c.Result, c.Text = maint.CheckWarn, a.cfg.RunDir+" is not in RAM: a pause could wait for a disk"
		c.Remedy = "set run_dir to a folder on a tmpfs"
	case fs.Bavail*uint64(fs.Bsize) < roomWarn/4:
		c.Result, c.Text, c.Remedy = maint.CheckWarn, fmt.Sprintf("%s has %d MiB left", a.cfg.RunDir, fs.Bavail*uint64(fs.Bsize)>>20), "make room"
	default:
		c.Text = a.cfg.RunDir + " is in RAM"
	}
	return c
}

// checkAgents names the guests whose clocks nobody can put right.
func (a *Agent) checkAgents() maint.Check {
	c := maint.Check{Rung: "B", Name: "guests' clocks", Result: maint.CheckOK, Text: "every guest that runs has an agent that answers libvirt"}
	if n, names := a.running(func(g maint.Guest) bool { return g.Agent != maint.AgentConnected }); n > 0 {
		c.Result, c.Text = maint.CheckWarn, fmt.Sprintf("the clocks of %d guests cannot be put right after a pause: no agent in %s", n, names)
		c.Remedy = "install qemu-guest-agent in them, and on Debian util-linux-extra"
	}
	return c
}

// checkHook: what a new QEMU under a guest needs of the host.
func (a *Agent) checkHook() maint.Check {
	c := maint.Check{Rung: "B", Name: "libvirt's hook", Result: maint.CheckOK, Text: "libvirt runs Belay's hook, which a new QEMU under a guest needs"}
	if why := a.preserve.Places.HookMissing(); why != "" {
		c.Result, c.Text = maint.CheckWarn, "no guest can get a new QEMU in place: libvirt does not run Belay's hook: "+why
		c.Remedy = "install dist/hooks/qemu.d/* in /etc/libvirt/hooks/qemu.d, executable, and restart libvirt's daemon; guests go on running"
	}
	return c
}

// checkMemory names the guests whose memory only their own QEMU can have.
func (a *Agent) checkMemory() maint.Check {
	c := maint.Check{Rung: "B", Name: "guests' memory", Result: maint.CheckOK, Text: "every guest that runs has its memory in shared files, so that a new QEMU takes it over in place"}
	if n, names := a.running(func(g maint.Guest) bool { return g.MemorySource != "file" || !g.MemoryShared }); n > 0 {
		c.Result, c.Text = maint.CheckWarn, fmt.Sprintf("the memory of %d guests cannot stay in place, a new QEMU needs a copy: %s", n, names)
		c.Remedy = "give them <memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>, which holds from their next start"
	}
	return c
}

// running counts the guests that run and are so, and names the first of them.
func (a *Agent) running(so func(maint.Guest) bool) (n int, names string) {
	const most = 5
	var first []string
	for _, g := range a.view.last.Load().guests {
		if g.State != maint.GuestRunning || !so(g) {
			continue
		}
		if n++; n <= most {
			first = append(first, g.Name)
		}
	}
	if n > most {
		first = append(first, "…")
	}
	return n, strings.Join(first, ", ")
}
