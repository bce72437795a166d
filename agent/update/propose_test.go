package update_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"belay/agent/maint"
	"belay/agent/update"
)

// TestPropose: each package is in one change, by what it touches, and the manifest can be
// taken as it is written.
func TestPropose(t *testing.T) {
	t.Parallel()
	pending := []maint.PendingPackage{
		{Name: "bash", From: "1", To: "5.2.15-2+b13"},
		{Name: "intel-microcode", From: "1", To: "3.20251111.1~deb12u1"},
		{Name: "libssl3", From: "1", To: "3.0.17-1~deb12u2", Security: true, QEMU: true, Units: []string{"ovs-vswitchd.service", "ssh.service"}},
		{Name: "linux-image-6.1.0-30-amd64", To: "6.1.124-1"},
		{Name: "linux-image-amd64", From: "1", To: "6.1.124-1"},
		{Name: "openvswitch-switch", From: "1", To: "3.1.0-2+deb12u1", Units: []string{"openvswitch-switch.service"}, OwnUnits: []string{"openvswitch-switch.service"}},
		{Name: "qemu-system-x86", From: "1", To: "1:7.2+dfsg-7+deb12u12"},
		{Name: "librados2", From: "1", To: "16.2.15", Units: []string{"multipathd.service"}},
	}
	u, notes := update.Propose("pending-1", pending)
	var got []string
	for _, c := range u.Changes {
		got = append(got, fmt.Sprintf("%s %s %v %v", c.Name, c.Kind, c.Rungs, c.Packages))
	}
	want := []string{
		"packages packages [A] [bash=5.2.15-2+b13 linux-image-amd64=6.1.124-1 librados2=16.2.15]",
		"microcode microcode [A B3 D] [intel-microcode=3.20251111.1~deb12u1]",
		"qemu qemu [B2 B3 D] [libssl3=3.0.17-1~deb12u2 qemu-system-x86=1:7.2+dfsg-7+deb12u12]",
		"on-guests-path packages [B1 B3 D] [openvswitch-switch=3.1.0-2+deb12u1]",
		"multipathd service [B1 B3 D] []",
		"ovs-vswitchd service [B1 B3 D] []",
		"kernel kernel [B3 D] [linux-image-6.1.0-30-amd64=6.1.124-1]",
	}
	if !slices.Equal(got, want) {
		t.Errorf("%s", strings.Join(got, "\n"))
	}
	if u.Urgency != maint.UrgencySecurity || u.Changes[6].Kernel != "/boot/vmlinuz-6.1.0-30-amd64" || u.Changes[1].Kernel != u.Changes[6].Kernel {
		t.Errorf("%+v", u)
	}
	if all := strings.Join(notes, "\n"); !strings.Contains(all, "ssh.service") || !strings.Contains(all, "download them first") || strings.Contains(all, "openvswitch-switch.service") {
		t.Errorf("%s", all)
	}
	text, err := update.Format(u)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := update.Parse("m", text); err != nil {
		t.Errorf("%v\n%s", err, text)
	}
	if u, _ := update.Propose("p", nil); len(u.Changes) != 0 {
		t.Errorf("of nothing it makes %+v", u.Changes)
	}
	// A whole point release.
	var many []maint.PendingPackage
	for i := range 450 {
		many = append(many, maint.PendingPackage{Name: fmt.Sprintf("lib%d", i), To: "1"})
	}
	u, _ = update.Propose("p", many)
	if ps := update.Check(u); len(u.Changes) != 3 || len(ps) > 0 {
		t.Errorf("%d changes, %v", len(u.Changes), ps)
	}
}
