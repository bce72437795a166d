package local

import (
	"errors"
	"net"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// SeenBy are the ports, by name, behind which this host's Linux bridges have learned that
// a MAC address is, or were told so.
//
// Source: the bridges' forwarding databases, RTM_GETNEIGH of AF_BRIDGE (bridge fdb show).
func (h *Host) SeenBy(mac net.HardwareAddr) (ports []string, err error) {
	known, err := h.neighbours()
	if err != nil {
		return nil, err
	}
	for _, n := range known {
		if n.MasterIndex == 0 || n.Flags&netlink.NTF_SELF != 0 || !slices.Equal(n.HardwareAddr, mac) {
			continue
		}
		if name, err := h.linkName(n.LinkIndex); err == nil && !slices.Contains(ports, name) {
			ports = append(ports, name)
		}
	}
	return ports, nil
}

// neighbours reads all forwarding databases. A dump that changes meanwhile is read again.
func neighbours() (all []netlink.Neigh, err error) {
	for range 3 {
		if all, err = netlink.NeighList(0, unix.AF_BRIDGE); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return all, err
		}
	}
	return all, nil // of what has not changed all is there
}

func linkName(index int) (string, error) {
	l, err := net.InterfaceByIndex(index)
	if err != nil {
		return "", err
	}
	return l.Name, nil
}
