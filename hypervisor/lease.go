package hypervisor

import (
	"path/filepath"

	"github.com/digitalocean/go-libvirt"

	"belay/agent/maint"
	"belay/hypervisor/internal/lockd"
)

// giveUpOwn gives up the leases of its disks that a paused guest's own QEMU holds
// in virtlockd, and says whether there were any. See package lockd for how they
// come to be held. Somebody else's are not touched, nor is a guest that runs.
//
// It knows the leases on the disks themselves, not those in a lockspace folder
// (file_lockspace_dir and the like of qemu-lockd.conf), nor sanlock's.
//
// Sources: virDomainGetState, virDomainGetXMLDesc; the QEMU's pid file and
// virtlockd's socket, which are beside libvirt's.
func (h *Host) giveUpOwn(s *session, d libvirt.Domain) (bool, error) {
	g, err := s.guest(d)
	if err != nil || g.State != maint.GuestPaused {
		return false, err
	}
	pid, err := qemuPID(s, g.Name)
	if err != nil {
		return false, err
	}
	var disks []string
	for _, disk := range g.Disks {
		if !disk.ReadOnly && (disk.Type == "file" || disk.Type == "block") && disk.Source != "" {
			disks = append(disks, disk.Source)
		}
	}
	n, err := lockd.Release(s.ctx, filepath.Join(filepath.Dir(s.conn.socket), "virtlockd-sock"),
		lockd.Owner{UUID: d.UUID, Name: g.Name, ID: g.ID, PID: pid}, disks)
	if n > 0 {
		h.log.Warn("gave up a guest's own leases, left by a libvirtd that died", "guest", g.Name, "leases", n)
	}
	return n > 0, err
}
