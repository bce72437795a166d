package hypervisor

import (
	"strings"
	"testing"

	"belay/agent/maint"
)

// FuzzDisks: whatever a definition has, it is read or refused; a disk that can be copied has
// a path, a format that is known and no other reason against it.
func FuzzDisks(f *testing.F) {
	disk := func(s string) string { return "<domain><devices>" + s + "</devices></domain>" }
	for _, s := range []string{"", "<domain", "<domain/>", disk("<disk/>"), disk("<disk type='file'><source file='/../..'/><target dev='vda'/></disk>"),
		disk("<disk type='file'><driver type='qcow2'/><source file='/a'/><target/><backingStore type='file'><format type='raw'/><source file='/b'/><backingStore/></backingStore></disk>"),
		disk("<disk type='file'><source file='/a'/><backingStore type='network'/></disk>"), disk("<disk type='file'><source file='a'/></disk>"),
		disk(strings.Repeat("<disk type='file'><source file='/a'/><target dev='vda'/></disk>", 3)),
		disk("<disk type='file'><source file='/a'/>" + strings.Repeat("<backingStore type='file'>", 2000) + strings.Repeat("</backingStore>", 2000) + "</disk>"),
		"<domain><metadata><placement xmlns='urn:belay:placement:1' anti-affinity='a a b'/><placement xmlns='urn:belay:placement:1' anti-affinity='c'/></metadata></domain>",
		"<domain><memory unit='KiB'>99999999999999999999</memory></domain>", "<domain><memory unit='YiB'>1</memory></domain>"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		_ = fill(&maint.Guest{}, s)
		disks, err := ParseDisks(s)
		if err != nil {
			return
		}
		for _, d := range disks {
			if d.Why == "" && (d.Path == "" || d.Format == "") {
				t.Errorf("%+v can be copied", d)
			}
		}
	})
}
