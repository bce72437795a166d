package twin

import (
	"path/filepath"
)

// DefaultRoot is where the twin lives. It is not below /run/belay, which systemd
// may remove with belayd, and short, as the address of a unix socket is.
const DefaultRoot = "/run/belay-twin"

// place is the twin's folder.
//
//	lock        held by the supervisor, with its process ID
//	failed      why the supervisor gave up
//	log/        what the daemons say
//	run/        /run/libvirt in the twin;  etc/  /etc/libvirt;  cache/  /var/cache/libvirt
//	lib/        /var/lib/libvirt/qemu;  dnsmasq/  /var/lib/libvirt/dnsmasq
//	home/       the host's /run, as seen in the twin
//	migrate/    QEMU's sockets for guests that cross
//	sink/       belayd's socket for a state that nobody wants
//	link/       which memory a QEMU that is to be started gets: home/UUID, twin/UUID
//	coming/     the hook's notes on guests that are migrating home
type place string

func (p place) at(elem ...string) string {
	return filepath.Join(append([]string{string(p)}, elem...)...)
}

func (p place) lock() string   { return p.at("lock") }
func (p place) failed() string { return p.at("failed") }

// socket is the twin's libvirtd, for a client outside.
func (p place) socket() string { return p.at("run", "libvirt-sock") }

// incoming is where a guest's QEMU waits for its state.
func (p place) incoming(uuid string) string { return p.at("migrate", uuid+".sock") }

// The sides, as the folders of orders call them.
const (
	atHome = "home"
	inTwin = "twin"
)

// order is the file that tells a side's hook what memory a guest's QEMU gets.
func (p place) order(side, uuid string) string { return p.at("link", side, uuid) }

// qemuPIDs are the pid files of the twin's QEMUs, each locked by its process.
func (p place) qemuPIDs() ([]string, error) {
	files, err := filepath.Glob(p.at("run", "qemu", "*.pid"))
	if err != nil {
		return nil, err
	}
	kept := files[:0]
	for _, f := range files {
		if filepath.Base(f) != "driver.pid" { // libvirtd's own
			kept = append(kept, f)
		}
	}
	return kept, nil
}
