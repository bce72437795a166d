package update

import (
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"belay/agent/maint"
)

// onGuestsPath are services that guests' traffic, disks or memory go through, as patterns:
// while they are restarted guests are held.
var onGuestsPath = []string{"openvswitch-switch.service", "ovs-*.service", "ovn-*.service", "frr.service", "networking.service", "systemd-networkd.service",
	"ceph*.service", "multipathd.service", "iscsid.service", "open-iscsi.service", "nvmf-*.service", "glusterd.service", "nfs-*.service", "rpc-*.service", "dnsmasq.service", "virtiofsd*.service"}

func guestsFeel(unit string) bool {
	return slices.ContainsFunc(onGuestsPath, func(p string) bool { ok, _ := path.Match(p, unit); return ok })
}

// install is how packages are installed, in these very versions, with nobody to answer
// questions, and without restarts of what does not belong to them (needrestart).
func install(packages []string, expected time.Duration) *maint.ChangeStep {
	command := append([]string{"env", "DEBIAN_FRONTEND=noninteractive", "NEEDRESTART_MODE=l", "apt-get", "install", "-y", "--no-remove"}, packages...)
	return &maint.ChangeStep{HostStep: maint.HostStep{Command: command}, Expected: expected}
}

// What installing is assumed to take: all packages of a change together.
const (
	aroundInstall = 5 * time.Second
	perPackage    = 1500 * time.Millisecond
	// atOnce is how many packages a change has at most.
	atOnce = 200
)

func takes(n int) time.Duration { return aroundInstall + time.Duration(n)*perPackage }

// Propose makes an update of what is pending: what each package touches decides by which
// rungs it can be delivered. notes are what a person has to see to. An update without changes
// is that nothing is pending.
//
//	a kernel                             kernel       B3 D
//	microcode                            microcode    A, or in the kernel's boot, D
//	mapped by guests' QEMUs, or QEMU     qemu         B2 B3 D   installed beforehand
//	brings a service on guests' path     packages     B1 B3 D   installed while they are held
//	mapped by such a service             service      B1 B3 D   installed beforehand
//	all others                           packages     A
func Propose(id string, pending []maint.PendingPackage) (u maint.Update, notes []string) {
	u = maint.Update{ID: id, Urgency: maint.UrgencyNormal, Description: fmt.Sprintf("%d pending packages", len(pending))}
	var rest, qemu, microcode, held []string
	var units []string // on guests' path, that run old code
	others := make(map[string]bool)
	var kernel *maint.Change
	for _, p := range pending {
		if p.Security {
			u.Urgency = maint.UrgencySecurity
		}
		spec := p.Name + "=" + p.To
		felt := slices.ContainsFunc(p.OwnUnits, guestsFeel)
		release, isKernel := strings.CutPrefix(p.Name, "linux-image-")
		switch {
		case isKernel && strings.ContainsAny(release, "0123456789") && strings.Count(release, ".") > 0 && !strings.HasSuffix(release, "-dbg"):
			if kernel != nil {
				notes = append(notes, fmt.Sprintf("%s and %s are both kernels: the update boots %s", kernel.Packages[0], spec, p.Name))
			}
			kernel = &maint.Change{Name: "kernel", Kind: maint.ChangeKernel, Rungs: maint.ChangeKernel.Rungs(), Kernel: "/boot/vmlinuz-" + release,
				Initrd: "/boot/initrd.img-" + release, Version: release, Packages: []string{spec}}
		case p.Name == "intel-microcode" || p.Name == "amd64-microcode":
			microcode = append(microcode, spec)
		case felt:
			held = append(held, spec)
		case p.QEMU || strings.HasPrefix(p.Name, "qemu-system"):
			qemu = append(qemu, spec)
		default:
			rest = append(rest, spec)
		}
		for _, unit := range p.Units {
			switch {
			case slices.Contains(p.OwnUnits, unit): // installing it restarts it
			case guestsFeel(unit):
				units = append(units, unit)
			default:
				others[unit] = true
			}
		}
	}
	add := func(name string, k maint.ChangeKind, packages []string, without ...maint.Rung) *maint.Change {
		u.Changes = append(u.Changes, maint.Change{Name: name, Kind: k, Packages: packages,
			Rungs: slices.DeleteFunc(k.Rungs(), func(r maint.Rung) bool { return slices.Contains(without, r) })})
		return &u.Changes[len(u.Changes)-1]
	}
	for n, some := range slices.Collect(slices.Chunk(rest, atOnce)) {
		name := "packages"
		if n > 0 {
			name += fmt.Sprintf("-%d", n+1)
		}
		add(name, maint.ChangePackages, some, maint.RungB1, maint.RungB3, maint.RungD).Prepare = install(some, takes(len(some)))
	}
	if len(microcode) > 0 {
		c := add("microcode", maint.ChangeMicrocode, microcode)
		c.Prepare = install(microcode, takes(len(microcode)))
		if kernel != nil {
			c.Kernel, c.Initrd = kernel.Kernel, kernel.Initrd
		} else {
			c.Rungs = []maint.Rung{maint.RungA, maint.RungD}
		}
	}
	if len(qemu) > 0 {
		add("qemu", maint.ChangeQEMU, qemu, maint.RungA).Prepare = install(qemu, takes(len(qemu)))
	}
	if len(held) > 0 {
		add("on-guests-path", maint.ChangePackages, held, maint.RungA).Apply = install(held, takes(len(held)))
		notes = append(notes, "guests are held while "+strings.Join(held, ", ")+" are installed: download them first (apt-get install --download-only), and correct what the change expects")
	}
	slices.Sort(units)
	for _, unit := range slices.Compact(units) {
		c := add(strings.TrimSuffix(unit, ".service"), maint.ChangeService, nil, maint.RungA)
		c.Apply = &maint.ChangeStep{HostStep: maint.HostStep{Unit: unit}}
	}
	if kernel != nil {
		kernel.Prepare = install(kernel.Packages, takes(10)) // with its initrd
		u.Changes = append(u.Changes, *kernel)
	}
	if len(others) > 0 {
		var names []string
		for unit := range others {
			names = append(names, unit)
		}
		slices.Sort(names)
		notes = append(notes, "these services go on with old code until they are restarted; add a change of kind service for each that is to be, or restart them yourself: "+strings.Join(names, ", "))
	}
	if len(u.Changes) > maxChanges {
		notes = append(notes, fmt.Sprintf("%d changes are more than a manifest can have (%d): make several of it", len(u.Changes), maxChanges))
	}
	return u, notes
}
