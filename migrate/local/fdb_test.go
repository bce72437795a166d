package local

import (
	"errors"
	"net"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
)

func TestSeenBy(t *testing.T) {
	t.Parallel()
	mac, other := net.HardwareAddr{0x52, 0x54, 0, 0, 0, 1}, net.HardwareAddr{0x52, 0x54, 0, 0, 0, 2}
	h := New(t.TempDir(), "")
	h.linkName = func(i int) (string, error) {
		if i == 9 {
			return "", errors.New("has gone")
		}
		return map[int]string{3: "vnet0", 4: "uplink"}[i], nil
	}
	h.neighbours = func() ([]netlink.Neigh, error) {
		return []netlink.Neigh{
			{LinkIndex: 3, MasterIndex: 2, HardwareAddr: mac, Vlan: 1}, {LinkIndex: 3, MasterIndex: 2, HardwareAddr: mac},
			{LinkIndex: 4, MasterIndex: 2, HardwareAddr: other},
			{LinkIndex: 4, HardwareAddr: mac}, // of a link that is on no bridge
			{LinkIndex: 4, MasterIndex: 2, Flags: netlink.NTF_SELF, HardwareAddr: mac},
			{LinkIndex: 9, MasterIndex: 2, HardwareAddr: mac},
		}, nil
	}
	if got, err := h.SeenBy(mac); err != nil || !slices.Equal(got, []string{"vnet0"}) {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := h.SeenBy(net.HardwareAddr{2}); err != nil || got != nil {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := neighbours(); err != nil {
		t.Errorf("the kernel's own: %v", err)
	}
}
