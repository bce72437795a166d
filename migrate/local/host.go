package local

import (
	"context"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/vishvananda/netlink"

	"belay/agent/maint"
	"belay/migrate"
)

const (
	// patience is how long storage may take to answer a look.
	patience = 5 * time.Second
	// most is how many looks can wait for storage at once.
	most = 32
)

// Host is this host.
type Host struct {
	root  string // put before every path
	marks string // where it is kept which marks there are
	turns chan struct{}

	addresses func() ([]net.Addr, error) // net.InterfaceAddrs
	wait      time.Duration              // patience
	now       func() time.Time

	// create makes an image; making has what is being made, however long that takes.
	create func(ctx context.Context, path string, d maint.DiskCopy) error
	making sync.Map // MadeFile.Temp

	neighbours func() ([]netlink.Neigh, error) // of all bridges
	linkName   func(index int) (string, error)
}

// New looks at the host whose root folder is root, "" for the one it runs on. The
// records of marks are kept in the folder marks, which is made when it is needed.
func New(root, marks string) *Host {
	return &Host{root: root, marks: marks, turns: make(chan struct{}, most), addresses: net.InterfaceAddrs, wait: patience, now: time.Now, create: create,
		neighbours: neighbours, linkName: linkName}
}

// at is where a path of the host is.
func (h *Host) at(path string) string { return filepath.Join(h.root, path) }

// look runs f, and gives its result if it has one in time.
func look[T any](ctx context.Context, h *Host, f func() T) (v T, ok bool) {
	return lookFrom(ctx, h, func() {}, f)
}

// lookFrom is look that calls begin before f, if f is run at all: in time or not.
func lookFrom[T any](ctx context.Context, h *Host, begin func(), f func() T) (v T, ok bool) {
	ctx, cancel := context.WithTimeout(ctx, h.wait)
	defer cancel()
	select {
	case h.turns <- struct{}{}:
	case <-ctx.Done():
		return v, false
	}
	begin()
	done := make(chan T, 1)
	go func() {
		defer func() { <-h.turns }()
		done <- f()
	}()
	select {
	case v = <-done:
		return v, true
	case <-ctx.Done():
		return v, false
	}
}

// Look finds what there is of a guest's needs. It takes at most a few seconds,
// whatever becomes of the storage.
func (h *Host) Look(ctx context.Context, n maint.Needs) migrate.Ground {
	ctx, cancel := context.WithTimeout(ctx, h.wait)
	defer cancel()
	g := migrate.Ground{Files: make(map[string]migrate.File), Links: make(map[string]migrate.Link), Sockets: make(map[string]migrate.Socket), PCI: make(map[string]bool)}
	for path, f := range h.files(ctx, n.Files) {
		g.Files[path] = f.File
	}
	for _, l := range n.Links {
		if link, ok := h.link(l.Name); ok {
			g.Links[l.Name] = link
		}
	}
	for _, address := range n.PCI {
		g.PCI[address] = h.there("/sys/bus/pci/devices/" + address)
	}
	if len(n.Sockets) > 0 {
		bound := h.boundSockets()
		for _, s := range n.Sockets {
			if at, ok := look(ctx, h, func() migrate.Socket { return h.socket(s.Path) }); ok {
				at.Bound = bound[s.Path]
				g.Sockets[s.Path] = at
			}
		}
	}
	if len(n.Ports) > 0 {
		g.Listening, g.Addresses = h.listening(), h.own()
	}
	for _, dir := range []string{"/usr/bin", "/usr/local/bin", "/bin"} {
		g.SwTPM = g.SwTPM || n.SwTPM && h.there(dir+"/swtpm")
	}
	return g
}

// there reports whether a path of the system's own leads anywhere.
func (h *Host) there(path string) bool {
	_, err := os.Stat(h.at(path))
	return err == nil
}

// own are the host's addresses.
func (h *Host) own() (own []netip.Addr) {
	all, err := h.addresses()
	if err != nil {
		return nil
	}
	for _, a := range all {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			own = append(own, p.Addr().WithZone(""))
		}
	}
	return own
}
