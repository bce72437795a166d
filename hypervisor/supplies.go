package hypervisor

import (
	"cmp"
	"context"
	"encoding/xml"
	"fmt"
	"slices"

	"github.com/digitalocean/go-libvirt"

	"belay/agent/maint"
)

// cellsXML is the part of <capabilities> that tells of NUMA cells.
type cellsXML struct {
	Cells []struct {
		ID    int `xml:"id,attr"`
		Pages []struct {
			Size  uint64 `xml:"size,attr"`
			Unit  string `xml:"unit,attr"`
			Count uint64 `xml:",chardata"`
		} `xml:"pages"`
	} `xml:"host>topology>cells>cell"`
}

// Supplies tells what libvirt on this host has of what guests need: its networks,
// its storage pools, and the names of its secrets. A libvirt that knows nothing of a sort has none
// of it.
//
// Sources: virConnectListAllNetworks, virConnectListAllStoragePools,
// virConnectListAllSecrets.
func (h *Host) Supplies(ctx context.Context) (maint.Supplies, error) {
	s := maint.Supplies{Networks: make(map[string]bool), Pools: make(map[string]bool)}
	err := h.do(ctx, func(c *session) (err error) {
		if err := c.networks(s.Networks); err != nil {
			return err
		}
		if err := c.storage(s.Pools); err != nil {
			return err
		}
		s.Secrets, err = c.secrets()
		return err
	})
	if err != nil {
		return maint.Supplies{}, err
	}
	return s, nil
}

// HugePages tells how many huge pages of each size are free in each of this host's
// NUMA cells, in the order of the cells. Sizes of which a cell has none at all are
// left out.
//
// Sources: virConnectGetCapabilities, virNodeGetFreePages.
func (h *Host) HugePages(ctx context.Context) (pools []maint.PagePool, err error) {
	err = h.do(ctx, func(s *session) error {
		pools, err = s.pools()
		return err
	})
	return pools, err
}

func (s *session) networks(into map[string]bool) error {
	for flag, active := range map[libvirt.ConnectListAllNetworksFlags]bool{
		libvirt.ConnectListNetworksActive: true, libvirt.ConnectListNetworksInactive: false} {
		all, err := call(s, "ConnectListAllNetworks", func(l *libvirt.Libvirt) ([]libvirt.Network, error) {
			nets, _, err := l.ConnectListAllNetworks(1, flag)
			return nets, err
		})
		if isCode(err, libvirt.ErrNoSupport) {
			return nil
		}
		if err != nil {
			return err
		}
		for _, n := range all {
			into[n.Name] = into[n.Name] || active // one that was started between the two questions is active
		}
	}
	return nil
}

func (s *session) storage(into map[string]bool) error {
	for flag, active := range map[libvirt.ConnectListAllStoragePoolsFlags]bool{
		libvirt.ConnectListStoragePoolsActive: true, libvirt.ConnectListStoragePoolsInactive: false} {
		all, err := call(s, "ConnectListAllStoragePools", func(l *libvirt.Libvirt) ([]libvirt.StoragePool, error) {
			pools, _, err := l.ConnectListAllStoragePools(1, flag)
			return pools, err
		})
		if isCode(err, libvirt.ErrNoSupport) {
			return nil
		}
		if err != nil {
			return err
		}
		for _, p := range all {
			into[p.Name] = into[p.Name] || active
		}
	}
	return nil
}

func (s *session) secrets() ([]maint.SecretNeed, error) {
	all, err := call(s, "ConnectListAllSecrets", func(l *libvirt.Libvirt) ([]libvirt.Secret, error) {
		secrets, _, err := l.ConnectListAllSecrets(1, 0)
		return secrets, err
	})
	if isCode(err, libvirt.ErrNoSupport) {
		return nil, nil
	}
	var names []maint.SecretNeed
	for _, one := range all {
		names = append(names, maint.SecretNeed{UUID: formatUUID(one.UUID), Usage: one.UsageID})
	}
	return names, err
}

// pools asks for the huge pages of every size that each cell has any of.
func (s *session) pools() ([]maint.PagePool, error) {
	text, err := call(s, "ConnectGetCapabilities", (*libvirt.Libvirt).ConnectGetCapabilities)
	if err != nil {
		return nil, err
	}
	pools, err := hugePools(text)
	if err != nil {
		return nil, err
	}
	for i := range pools {
		p := &pools[i]
		counts, err := call(s, "NodeGetFreePages", func(l *libvirt.Libvirt) ([]uint64, error) {
			return l.NodeGetFreePages([]uint32{uint32(p.PageBytes >> 10)}, int32(p.Cell), 1, 0)
		})
		if err != nil {
			return nil, err
		}
		if len(counts) == 1 {
			p.Free = counts[0]
		}
	}
	return pools, nil
}

// hugePools are the pools of huge pages that <capabilities> has, in the order of
// their cells. The smallest pages of a cell are its ordinary ones, of which
// nobody makes a pool.
func hugePools(capabilities string) ([]maint.PagePool, error) {
	var caps cellsXML
	if err := xml.Unmarshal([]byte(capabilities), &caps); err != nil {
		return nil, fmt.Errorf("cannot read capabilities: %w", err)
	}
	pools := []maint.PagePool{}
	for _, c := range caps.Cells {
		var sizes []uint64
		for _, p := range c.Pages {
			size, err := bytesOf(p.Size, p.Unit)
			if err != nil {
				return nil, fmt.Errorf("cannot read capabilities: %w", err)
			}
			sizes = append(sizes, size)
			if p.Count > 0 {
				pools = append(pools, maint.PagePool{Cell: c.ID, PageBytes: size})
			}
		}
		if len(sizes) > 0 {
			ordinary := slices.Min(sizes)
			pools = slices.DeleteFunc(pools, func(p maint.PagePool) bool { return p.Cell == c.ID && p.PageBytes == ordinary })
		}
	}
	slices.SortFunc(pools, func(a, b maint.PagePool) int {
		return cmp.Or(cmp.Compare(a.Cell, b.Cell), cmp.Compare(a.PageBytes, b.PageBytes))
	})
	return pools, nil
}
