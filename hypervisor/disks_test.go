package hypervisor

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"belay/agent/maint"
)

func TestParseDisks(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, xml string
		want      *maint.GuestDisk // nil: not written to
		copied    bool
	}{
		{"raw", `<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/d/a' index='1'/><backingStore/><target dev='vda'/></disk>`,
			&maint.GuestDisk{DiskCopy: maint.DiskCopy{Target: "vda", Path: "/d/a", Format: "raw"}}, true},
		{"overlay", `<disk type='file'><driver type='qcow2'/><source file='/d//a'/><backingStore type='file' index='2'><format type='raw'/><source file='/base'/><backingStore/></backingStore><target dev='vda'/></disk>`,
			&maint.GuestDisk{DiskCopy: maint.DiskCopy{Target: "vda", Path: "/d/a", Format: "qcow2", Backing: "/base", BackingFormat: "raw"}}, true},
		{"read only", `<disk type='file' device='cdrom'><source file='/iso'/><target dev='sda'/><readonly/></disk>`, nil, false},
		{"no medium", `<disk type='file' device='floppy'><target dev='fda'/></disk>`, nil, false},
		{"block", `<disk type='block'><driver type='raw'/><source dev='/dev/vg/a'/><target dev='vda'/></disk>`,
			&maint.GuestDisk{DiskCopy: maint.DiskCopy{Target: "vda", Format: "raw"}}, false},
		{"pool", `<disk type='volume'><driver type='raw'/><source pool='p' volume='v'/><target dev='vda'/></disk>`,
			&maint.GuestDisk{DiskCopy: maint.DiskCopy{Target: "vda", Format: "raw"}}, false},
		{"network", `<disk type='network'><driver type='raw'/><source protocol='rbd' name='pool/a'/><target dev='vda'/></disk>`,
			&maint.GuestDisk{DiskCopy: maint.DiskCopy{Target: "vda", Format: "raw"}}, false},
		{"vmdk", `<disk type='file'><driver type='vmdk'/><source file='/d/a'/><target dev='vda'/></disk>`,
			&maint.GuestDisk{DiskCopy: maint.DiskCopy{Target: "vda", Path: "/d/a", Format: "vmdk"}}, false},
		{"of several guests", `<disk type='file'><driver type='raw'/><source file='/d/a'/><target dev='vda'/><shareable/></disk>`,
			&maint.GuestDisk{DiskCopy: maint.DiskCopy{Target: "vda", Path: "/d/a", Format: "raw"}}, false},
		{"encrypted", `<disk type='file'><driver type='qcow2'/><source file='/d/a'><encryption format='luks'><secret type='passphrase' uuid='u'/></encryption></source><target dev='vda'/></disk>`,
			&maint.GuestDisk{DiskCopy: maint.DiskCopy{Target: "vda", Path: "/d/a", Format: "qcow2"}}, false},
		{"over a block device", `<disk type='file'><driver type='qcow2'/><source file='/d/a'/><backingStore type='block'><format type='raw'/><source dev='/dev/b'/></backingStore><target dev='vda'/></disk>`,
			&maint.GuestDisk{DiskCopy: maint.DiskCopy{Target: "vda", Path: "/d/a", Format: "qcow2", BackingFormat: "raw"}}, false},
	} {
		disks, err := ParseDisks("<domain><devices>" + c.xml + "</devices></domain>")
		if err != nil {
			t.Fatal(err)
		}
		if c.want == nil {
			if len(disks) > 0 {
				t.Errorf("%s: %+v", c.name, disks)
			}
			continue
		}
		if len(disks) != 1 || (disks[0].Why == "") != c.copied {
			t.Fatalf("%s: %+v", c.name, disks)
		}
		disks[0].Why = ""
		if d := cmp.Diff(*c.want, disks[0]); d != "" {
			t.Errorf("%s: %s", c.name, d)
		}
	}
	if _, err := ParseDisks("<domain"); err == nil {
		t.Error("what is no XML has disks")
	}
}
