package twin

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"belay/agent/maint"
)

// Guard is what keeps a guest that is in the twin from being started at home a
// second time, by its autostart or by a person.
type Guard struct {
	// By names the protections that hold for all of the guest's disks.
	By []string
	// Bare are the disks (targets) that only the hook could protect, when the
	// hook is not known to be there.
	Bare []string
}

// guard tells what protects a guest with that XML.
//
//	lock manager   the lease of a disk is taken with it to the twin
//	image locks    QEMU's own, on files. On block devices they are worth
//	               something only where libvirt gives QEMU no private /dev,
//	               whose nodes have locks of their own
//	hook           refuses the start; libvirtd must have found it
func guard(portable string, s settings, hooked bool) (g Guard, err error) {
	var d domainXML
	if err := xml.Unmarshal([]byte(portable), &d); err != nil {
		return g, fmt.Errorf("cannot read domain XML: %w", err)
	}
	if m := s.text("lock_manager"); m != "" && m != "nop" {
		g.By = append(g.By, "the lock manager ("+m+")")
	}
	var bare []string
	disks := 0
	for i := range d.Devices.All {
		dev := &d.Devices.All[i]
		if dev.kind() != "disk" || dev.ReadOnly != nil || dev.Device == "cdrom" {
			continue
		}
		disks++
		locked := dev.Shared == nil && (dev.Type == "file" || dev.Type == "block" && s.emptyList("namespaces"))
		if !locked {
			bare = append(bare, dev.Target.Dev)
		}
	}
	switch {
	case disks == 0:
		g.By = append(g.By, "its having no disk to damage")
	case len(bare) == 0:
		g.By = append(g.By, "QEMU's image locks")
	}
	if hooked {
		g.By = append(g.By, "Belay's hook")
	}
	if len(g.By) == 0 {
		g.Bare = bare
	}
	return g, nil
}

// Problems are none, or why the guest must not go away.
func (g Guard) problems(guest string) []maint.Problem {
	if len(g.Bare) == 0 {
		return nil
	}
	return []maint.Problem{*maint.Problemf(maint.CodeSourceRefuses, "guest "+guest,
		"install Belay's hook as "+HookPath+" and restart libvirtd, or configure a lock manager (lock_manager in qemu.conf)",
		"nothing would keep it from being started a second time while it is in the twin, on the same disks (%s)", strings.Join(g.Bare, ", "))}
}

// hooked reports whether the libvirtd that runs here has found Belay's hook: it
// has called it.
func hooked(root string) (bool, error) {
	for _, d := range []string{"virtqemud", "libvirtd"} {
		pid, err := holder("/run/" + d + ".pid")
		if err != nil {
			return false, err
		}
		if pid == 0 {
			continue
		}
		_, err = os.Stat(hookedDir(root) + "/" + strconv.Itoa(pid))
		if err == nil || !errors.Is(err, fs.ErrNotExist) {
			return err == nil, err
		}
	}
	return false, nil
}
