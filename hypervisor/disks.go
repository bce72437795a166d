package hypervisor

import (
	"cmp"
	"context"
	"encoding/xml"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/digitalocean/go-libvirt"

	"belay/agent/maint"
)

// ParseDisks reads from a domain's live XML which disks it writes to, and whether they
// could be copied with it. Their sizes are not in it. Media of drives are among them where
// they are written to.
func ParseDisks(live string) ([]maint.GuestDisk, error) {
	var d domainXML
	if err := xml.Unmarshal([]byte(live), &d); err != nil {
		return nil, fmt.Errorf("cannot read domain XML: %w", err)
	}
	var disks []maint.GuestDisk
	for i := range d.Devices.All {
		dev := &d.Devices.All[i]
		if dev.XMLName.Local != "disk" || dev.ReadOnly != nil || dev.Source.String() == "" && dev.Source.Pool == "" {
			continue
		}
		disk := maint.GuestDisk{DiskCopy: maint.DiskCopy{Target: dev.Target.Dev, Format: cmp.Or(dev.Driver.Type, "raw")}}
		if dev.Source.File != "" {
			disk.Path = filepath.Clean(dev.Source.File)
		}
		if b := dev.Backing; b != nil && b.Type != "" {
			disk.Backing, disk.BackingFormat = b.Source.File, cmp.Or(b.Format.Type, "raw")
		}
		disk.Why = uncopyable(dev, disk.DiskCopy)
		disks = append(disks, disk)
	}
	return disks, nil
}

// uncopyable is why a disk cannot be copied, "" where it can.
func uncopyable(dev *deviceXML, d maint.DiskCopy) string {
	encrypted := func(s secretsXML) bool { return len(s.Secrets) > 0 || s.UUID != "" }
	switch {
	case dev.Type != "file":
		return fmt.Sprintf("it is of type %q, and only image files are copied", dev.Type)
	case dev.Shared != nil:
		return "other guests may write to it (<shareable/>)"
	case encrypted(dev.Encryption) || encrypted(dev.Source.Encryption):
		return "it is encrypted, and the destination would have to make an encrypted image"
	case !slices.Contains(maint.Formats, d.Format):
		return fmt.Sprintf("its format is %s, and only %v are copied", d.Format, maint.Formats)
	case dev.Backing != nil && dev.Backing.Type != "" && (d.Backing == "" || !slices.Contains(maint.Formats, d.BackingFormat)):
		return fmt.Sprintf("it is an overlay of what is no file of the formats %v", maint.Formats)
	}
	return ""
}

// DiskSize tells how large a disk of a running domain is, by its target or path: what the
// guest sees of it, and what its image takes on the host's storage, bytes. It wraps
// maint.ErrNoGuest.
//
// Source: virDomainGetBlockInfo.
func (h *Host) DiskSize(ctx context.Context, uuid, disk string) (bytes, allocated uint64, err error) {
	err = h.onDomain(ctx, uuid, func(s *session, d libvirt.Domain) error {
		_, err := call(s, "DomainGetBlockInfo", func(l *libvirt.Libvirt) (struct{}, error) {
			var err error
			allocated, bytes, _, err = l.DomainGetBlockInfo(d, disk, 0)
			return struct{}{}, err
		})
		return err
	})
	return bytes, allocated, err
}

// copyFlags are those of a migration that copies disks, too. An overlay is copied as
// such: what is in its own image, without what is below it. With that flag an image that
// is no overlay is copied whole.
func copyFlags(p maint.MoveParams) (flags libvirt.DomainMigrateFlags) {
	switch {
	case len(p.CopyDisks) == 0:
		return 0
	case p.CopyOverlays:
		flags = libvirt.MigrateNonSharedInc
	default:
		flags = libvirt.MigrateNonSharedDisk
	}
	if p.SyncWrites {
		flags |= migrateNonSharedSyncWrites
	}
	return flags
}

// migrateNonSharedSyncWrites is VIR_MIGRATE_NON_SHARED_SYNCHRONOUS_WRITES, since libvirt
// 8.0, which go-libvirt has no name for.
const migrateNonSharedSyncWrites libvirt.DomainMigrateFlags = 1 << 18

// copyParams name the disks that are copied, one parameter each.
func copyParams(p maint.MoveParams) (params []libvirt.TypedParam) {
	for _, target := range p.CopyDisks {
		params = append(params, libvirt.TypedParam{Field: libvirt.MigrateParamMigrateDisks, Value: *libvirt.NewTypedParamValueString(target)})
	}
	return params
}
