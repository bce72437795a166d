package migrate

import (
	"net/netip"
	"strings"
	"testing"

	"belay/agent/maint"
)

const mark = ".belay-0123456789abcdef0123456789abcdef"

func TestCheckNeeds(t *testing.T) {
	t.Parallel()
	const path, mib = "/srv/a", 1 << 20
	file := func(edit func(*maint.FileNeed)) maint.Needs {
		n := maint.FileNeed{For: "disk vda", Path: path, Kind: maint.FileRegular, Same: true, Inode: 7, Mark: mark}
		edit(&n)
		return maint.Needs{Files: []maint.FileNeed{n}}
	}
	found := func(f File) Ground { return Ground{Files: map[string]File{path: f}} }
	there := File{Known: true, Kind: maint.FileRegular, Inode: 7, Marked: true, Bytes: mib}
	same := func(*maint.FileNeed) {}
	unmarked := func(n *maint.FileNeed) { n.Mark = "" }
	block := func(device string, bytes uint64) func(*maint.FileNeed) {
		return func(n *maint.FileNeed) {
			n.Kind, n.Mark, n.Inode, n.Device, n.Bytes = maint.FileBlock, "", 9, device, bytes
		}
	}
	iso := func(n *maint.FileNeed) { n.For, n.Same, n.Mark, n.Bytes = "cdrom sda", false, "", mib }
	link := func(bridge, up bool) maint.Needs {
		return maint.Needs{Links: []maint.LinkNeed{{For: "interface m", Name: "br0", Bridge: bridge, Up: up}}}
	}
	links := func(l Link) Ground { return Ground{Links: map[string]Link{"br0": l}} }
	port := func(address string, number uint16) maint.Needs {
		return maint.Needs{Ports: []maint.PortNeed{{For: "graphics vnc", Address: netip.MustParseAddr(address), Port: number}}}
	}
	listening := func(at string) Ground {
		return Ground{Listening: []netip.AddrPort{netip.MustParseAddrPort(at)}, Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")}}
	}
	socket := func(listen bool) maint.Needs {
		return maint.Needs{Sockets: []maint.SocketNeed{{For: "serial", Path: path, Listen: listen}}}
	}
	sockets := func(s Socket) Ground { return Ground{Sockets: map[string]Socket{path: s}} }
	secret := func(uuid, usage string) maint.Needs {
		return maint.Needs{Secrets: []maint.SecretNeed{{For: "disk vda", UUID: uuid, Usage: usage}}}
	}
	has := maint.Supplies{Networks: map[string]bool{"on": true, "off": false}, Pools: map[string]bool{"on": true, "off": false}, Secrets: []maint.SecretNeed{{UUID: "u-1", Usage: "key"}, {UUID: "u-2"}}}
	net := func(name string) maint.Needs { return maint.Needs{Networks: []string{name}} }
	none := Ground{}
	for _, c := range []struct {
		name   string
		needs  maint.Needs
		ground Ground
		want   maint.Code // "" for none
		text   string
	}{
		{"nothing", maint.Needs{}, none, "", ""},

		{"the very file", file(same), found(there), "", ""},
		{"disk not there", file(same), found(File{Known: true}), maint.CodeDiskMissing, "has no /srv/a, which is disk vda"},
		{"storage hangs", file(same), found(File{Hangs: true}), maint.CodeStorageHangs, "does not answer for /srv/a"},
		{"may not be looked at", file(same), found(File{}), "", ""},
		{"not looked at", file(same), none, "", ""},
		{"no mark beside it", file(same), found(File{Known: true, Kind: maint.FileRegular, Inode: 7}), maint.CodeDiskNotShared, "has a file of its own at /srv/a, not the one that is disk vda"},
		{"a block device in its place", file(same), found(File{Known: true, Kind: maint.FileBlock}), maint.CodeDiskNotShared, "has a block device at /srv/a, disk vda is a file"},
		{"marked, with another inode number", file(func(n *maint.FileNeed) { n.Inode = 8 }), found(there), "", ""},
		{"unmarked, with the same inode number", file(unmarked), found(File{Known: true, Kind: maint.FileRegular, Inode: 7}), "", ""},
		{"unmarked, with another inode number", file(unmarked), found(File{Known: true, Kind: maint.FileRegular, Inode: 8}), maint.CodeDiskNotShared, "of its own"},
		{"unmarked, its inode number not known", file(func(n *maint.FileNeed) { n.Mark, n.Inode = "", 0 }), found(there), "", ""},

		{"the same device", file(block("dm-1", mib)), found(File{Known: true, Kind: maint.FileBlock, Device: "dm-1", Bytes: mib}), "", ""},
		{"another device", file(block("dm-1", mib)), found(File{Known: true, Kind: maint.FileBlock, Device: "dm-2", Bytes: mib}), maint.CodeDiskNotShared, "has a block device of its own"},
		{"a device of no identity", file(block("", mib)), found(File{Known: true, Kind: maint.FileBlock, Device: "dm-2", Bytes: mib}), "", ""},
		{"a device of another size", file(block("dm-1", mib)), found(File{Known: true, Kind: maint.FileBlock, Device: "dm-1", Bytes: 2 * mib}), maint.CodeDiskNotShared, "has 2097152 bytes there and 1048576 here"},

		{"medium", file(iso), found(there), "", ""},
		{"a copy of the medium", file(iso), found(File{Known: true, Kind: maint.FileRegular, Inode: 99, Bytes: mib}), "", ""},
		{"medium not there", file(iso), found(File{Known: true}), maint.CodeDiskMissing, "has no /srv/a, which is cdrom sda"},
		{"another medium", file(iso), found(File{Known: true, Kind: maint.FileRegular, Bytes: 5}), maint.CodeDiskDiffers, "has 5 bytes there and 1048576 here"},

		{"network", net("on"), none, "", ""},
		{"network not active", net("off"), none, maint.CodeNetwork, "its libvirt network off is not active"},
		{"no network", net("x"), none, maint.CodeNetwork, "has no libvirt network x"},

		{"pool", maint.Needs{Pools: []string{"on"}}, none, "", ""},
		{"pool not active", maint.Needs{Pools: []string{"off"}}, none, maint.CodeDiskMissing, "its storage pool off is not active"},
		{"no pool", maint.Needs{Pools: []string{"x"}}, none, maint.CodeDiskMissing, "has no storage pool x"},

		{"bridge", link(true, true), links(Link{Up: true, Bridge: true}), "", ""},
		{"no bridge", link(true, true), none, maint.CodeNetwork, "has no bridge br0, which interface m is on"},
		{"no link", link(false, true), none, maint.CodeNetwork, "has no link br0"},
		{"bridge down", link(true, true), links(Link{Bridge: true}), maint.CodeNetwork, "its br0 is down"},
		{"not a bridge", link(true, true), links(Link{Up: true}), maint.CodeNetwork, "its br0 is no bridge"},
		{"Open vSwitch, its port down", link(false, false), links(Link{}), "", ""},

		{"PCI device", maint.Needs{PCI: []string{"p"}}, Ground{PCI: map[string]bool{"p": true}}, "", ""},
		{"no PCI device", maint.Needs{PCI: []string{"p"}}, Ground{PCI: map[string]bool{"p": false}}, maint.CodeHostDevice, "has no PCI device p"},

		{"secret by its UUID", secret("U-1", ""), none, "", ""},
		{"secret by its usage", secret("", "key"), none, "", ""},
		{"no secret of that UUID", secret("u-3", ""), none, maint.CodeSecret, "has no secret u-3, which disk vda needs"},
		{"no secret of that usage", secret("", "other"), none, maint.CodeSecret, "has no secret other"},

		{"socket to listen on", socket(true), sockets(Socket{Folder: true, There: true}), "", ""},
		{"socket that is taken", socket(true), sockets(Socket{Folder: true, Bound: true}), maint.CodeSocket, "somebody listens on /srv/a"},
		{"no folder for a socket", socket(true), sockets(Socket{}), maint.CodeSocket, "has no folder for the socket /srv/a"},
		{"socket to connect to", socket(false), sockets(Socket{Folder: true, There: true, Bound: true}), "", ""},
		{"no socket to connect to", socket(false), sockets(Socket{Folder: true}), maint.CodeSocket, "has no socket /srv/a"},
		{"socket not looked at", socket(false), none, "", ""},

		{"port", port("0.0.0.0", 5900), listening("127.0.0.1:5901"), "", ""},
		{"port taken", port("0.0.0.0", 5900), listening("10.0.0.1:5900"), maint.CodePort, "somebody listens on port 5900"},
		{"port taken on all addresses", port("10.0.0.1", 5900), listening("[::]:5900"), maint.CodePort, "somebody listens on port 5900"},
		{"port taken on that address", port("10.0.0.1", 5900), listening("10.0.0.1:5900"), maint.CodePort, "port 5900"},
		{"port taken on another address", port("10.0.0.1", 5900), listening("10.0.0.2:5900"), "", ""},
		{"any port", port("127.0.0.1", 0), listening("127.0.0.1:5900"), "", ""},
		{"an address of another host", port("10.9.9.9", 0), listening("127.0.0.1:1"), maint.CodePort, "has no address 10.9.9.9"},
		{"loopback", port("::1", 5900), none, "", ""},

		{"TPM", maint.Needs{SwTPM: true}, Ground{SwTPM: true}, "", ""},
		{"no swtpm", maint.Needs{SwTPM: true}, none, maint.CodeTPM, "has no swtpm"},
	} {
		ps := CheckNeeds(c.needs, "host-b", c.ground, has)
		wantOne(t, c.name, ps, c.want, c.text)
	}
}

// TestCheckPages: huge pages are those of the size, of the cells, and not promised.
func TestCheckPages(t *testing.T) {
	t.Parallel()
	const mib, small, big = 1 << 20, 2 << 20, gib
	pools := []maint.PagePool{{Cell: 0, PageBytes: small, Free: 4}, {Cell: 1, PageBytes: small, Free: 6}, {Cell: 1, PageBytes: big, Free: 1}}
	need := func(size, bytes uint64, cells ...int) maint.PageNeed {
		return maint.PageNeed{PageBytes: size, Bytes: bytes, Cells: cells}
	}
	type needs []maint.PageNeed
	for _, c := range []struct {
		name     string
		needs    needs
		promised needs
		arriving bool   // what is promised has begun to arrive
		want     string // "" for none
	}{
		{"none", nil, nil, false, ""},
		{"all there are", needs{need(small, 20*mib), need(big, gib)}, nil, false, ""},
		{"one too many", needs{need(small, 22*mib)}, nil, false, "has 10 huge pages of 2048 KiB free, of which the guest needs 11"},
		{"part of a page", needs{need(small, 21*mib)}, nil, false, "needs 11"},
		{"in a cell", needs{need(small, 12*mib, 1)}, nil, false, ""},
		{"not in that cell", needs{need(small, 10*mib, 0)}, nil, false, "in its NUMA cells 0 it has 4 huge pages of 2048 KiB free, of which the guest needs 5"},
		{"in a cell that is not there", needs{need(small, 2*mib, 7)}, nil, false, "in its NUMA cells 7 it has 0"},
		{"those with a choice give way", needs{need(small, 12*mib), need(small, 8*mib, 0)}, nil, false, ""},
		{"of no size that is there", needs{need(64<<10, mib)}, nil, false, "has 0 huge pages of 64 KiB"},
		{"of the default size", needs{need(0, 22*mib)}, nil, false, "has 10 huge pages of 2048 KiB"},
		{"promised to others", needs{need(small, 12*mib)}, needs{need(small, 10*mib)}, false, "has 5 huge pages of 2048 KiB free, of which the guest needs 6"},
		{"taken by others already", needs{need(small, 12*mib)}, needs{need(small, 10*mib)}, true, ""},
	} {
		r := room(func(r *Room) {
			r.HugePages, r.HugePageBytes = pools, small
			r.Reservations = []maint.Reservation{{Op: "mig-2", GuestUUID: "other", Guest: "other", Pages: c.promised}, {Op: "mig-1", Pages: needs{need(small, 20*mib)}}}
			if c.arriving {
				r.Guests = []maint.Guest{{UUID: "other", Name: "other", State: maint.GuestPaused}}
			}
		})
		ps := CheckArrival(t.Context(), arrival(func(a *maint.Arrival) { a.Pages = c.needs }), r, cpu{})
		switch {
		case c.want == "" && len(ps) > 0:
			t.Errorf("%s: %+v", c.name, ps)
		case c.want != "" && (len(ps) != 1 || ps[0].Code != maint.CodeNoPages || !strings.Contains(ps[0].Reason, c.want) || ps[0].Remedy == ""):
			t.Errorf("%s: %+v", c.name, ps)
		}
	}
}

// TestHugePagesAreNoOrdinaryMemory: neither of the arrival nor of what is promised.
func TestHugePagesAreNoOrdinaryMemory(t *testing.T) {
	t.Parallel()
	huge := []maint.PageNeed{{PageBytes: 2 << 20, Bytes: gib}}
	r := room(func(r *Room) {
		r.Host.FreeMemoryBytes = 2 * overhead
		r.HugePages = []maint.PagePool{{PageBytes: 2 << 20, Free: 1024}}
		r.Reservations = []maint.Reservation{{Op: "mig-2", GuestUUID: "other", Guest: "other", MemoryBytes: gib, Pages: huge}}
	})
	if ps := CheckArrival(t.Context(), arrival(func(a *maint.Arrival) { a.Pages = huge }), r, cpu{}); len(ps) > 0 {
		t.Errorf("%+v", ps)
	}
	r.Host.FreeMemoryBytes--
	if ps := CheckArrival(t.Context(), arrival(func(a *maint.Arrival) { a.Pages = huge }), r, cpu{}); len(ps) != 1 || ps[0].Code != maint.CodeNoRoom {
		t.Errorf("with a byte less: %+v", ps)
	}
}
