package lab

import (
	"errors"
	"fmt"
	"os"
	"strings"
)

// need is a program that a lab cannot do without, and the Debian package that
// brings it.
type need struct{ program, pkg string }

func needs() []need {
	return []need{
		{"cp", "coreutils"},
		{"hostname", "hostname"},
		{"ip", "iproute2"},
		{"libvirtd", "libvirt-daemon"},
		{"losetup", "mount"},
		{"mount", "mount"},
		{"nsenter", "util-linux"},
		{"perl", "perl-base"},
		{"qemu-system-x86_64", "qemu-system-x86"},
		{"sh", "dash"},
		{"sleep", "coreutils"},
		{"tc", "iproute2"},
		{"umount", "mount"},
		{"virsh", "libvirt-clients"},
		{"virtlockd", "libvirt-daemon"},
		{"virtlogd", "libvirt-daemon"},
	}
}

// checkMachine refuses a machine that cannot hold a lab, naming everything that
// is missing at once.
func checkMachine() error {
	if os.Geteuid() != 0 {
		return errors.New("namespaces, bridges and libvirtd need root: run as root (sudo)")
	}
	var missing, pkgs []string
	seen := map[string]bool{}
	for _, n := range needs() {
		if _, err := lookTool(n.program); err == nil {
			continue
		}
		missing = append(missing, n.program)
		if !seen[n.pkg] {
			seen[n.pkg] = true
			pkgs = append(pkgs, n.pkg)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("programs are missing: %s: apt-get install %s",
			strings.Join(missing, ", "), strings.Join(pkgs, " "))
	}
	return nil
}
