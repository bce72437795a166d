package pending_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"belay/agent/maint"
	"belay/patch/pending"
)

// said is what apt-get -s says, some of it.
const said = `NOTE: This is only a simulation!
Reading package lists...
The following NEW packages will be installed:
  linux-image-6.1.0-30-amd64
Inst libssl3 [3.0.15-1~deb12u1] (3.0.17-1~deb12u2 Debian:12.11/stable, Debian-Security:12/stable-security [amd64]) []
Inst qemu-system-x86 [1:7.2+dfsg-7+deb12u7] (1:7.2+dfsg-7+deb12u12 Debian:12.9/stable [amd64])
Inst openvswitch-switch [3.1.0-2] (3.1.0-2+deb12u1 Debian:12.9/stable [amd64])
Inst linux-image-6.1.0-30-amd64 (6.1.124-1 Debian-Security:12/stable-security [amd64])
Inst bash [5.2.15-2+b8] (5.2.15-2+b13 Debian:12.15/oldstable [amd64]) [perl:amd64 ]
Conf libssl3 (3.0.17-1~deb12u2 Debian:12.11/stable [amd64])
`

// tree is a host's files.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// TestLook: who has a package's files mapped is who runs it, also where the file was replaced,
// and however the system's /usr is merged.
func TestLook(t *testing.T) {
	t.Parallel()
	const ssl = "7f00-7f01 r-xp 00000000 08:01 12 "
	root := tree(t, map[string]string{
		"var/lib/dpkg/info/libssl3:amd64.list":      "/.\n/usr/lib/x86_64-linux-gnu/libssl.so.3\n",
		"var/lib/dpkg/info/qemu-system-x86.list":    "/usr/bin/qemu-system-x86_64\n",
		"var/lib/dpkg/info/openvswitch-switch.list": "/lib/systemd/system/openvswitch-switch.service\n/usr/lib/systemd/system/ovs-x@.service\n/usr/sbin/ovs-vswitchd\n",
		"proc/100/maps":   ssl + "                 /usr/lib/x86_64-linux-gnu/libssl.so.3\n7f02-7f03 rw-p 00000000 00:00 0 [heap]\n",
		"proc/100/cgroup": "0::/machine.slice/machine-qemu.scope\n",
		"proc/200/maps":   ssl + "                 /lib/x86_64-linux-gnu/libssl.so.3 (deleted)\n" + ssl + "  /usr/sbin/ovs-vswitchd\n",
		"proc/200/cgroup": "0::/system.slice/ovs-vswitchd.service\n",
		"proc/300/maps":   ssl + "                 /usr/lib/x86_64-linux-gnu/libssl.so.3\n",
		"proc/300/cgroup": "1:name=systemd:/system.slice/system-getty.slice/ssh.service\n",
		"proc/301/maps":   ssl + "                 /usr/lib/x86_64-linux-gnu/libssl.so.3\n", // it ends meanwhile
		"proc/400/maps":   ssl + "                 /usr/lib/x86_64-linux-gnu/libssl.so.3\n",
		"proc/400/cgroup": "0::/user.slice/user-0.slice\n",
		"proc/self/maps":  "x",
	})
	h := pending.Host{Root: root, Simulate: func(context.Context) ([]byte, error) { return []byte(said), nil }}
	got, err := h.Look(t.Context(), []int{100, 0})
	if err != nil {
		t.Fatal(err)
	}
	want := []maint.PendingPackage{
		{Name: "bash", From: "5.2.15-2+b8", To: "5.2.15-2+b13"},
		{Name: "libssl3", From: "3.0.15-1~deb12u1", To: "3.0.17-1~deb12u2", Security: true, QEMU: true, Units: []string{"ovs-vswitchd.service", "ssh.service"}},
		{Name: "linux-image-6.1.0-30-amd64", To: "6.1.124-1", Security: true},
		{Name: "openvswitch-switch", From: "3.1.0-2", To: "3.1.0-2+deb12u1", Units: []string{"ovs-vswitchd.service"}, OwnUnits: []string{"openvswitch-switch.service"}},
		{Name: "qemu-system-x86", From: "1:7.2+dfsg-7+deb12u7", To: "1:7.2+dfsg-7+deb12u12"},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	h.Simulate = func(context.Context) ([]byte, error) { return nil, errors.New("no such program") }
	var p *maint.Problem
	if _, err := h.Look(t.Context(), nil); !errors.As(err, &p) || p.Remedy == "" {
		t.Errorf("%v", err)
	}
	if _, err := pending.Parse([]byte("Inst odd\n")); err == nil {
		t.Error("what cannot be read is passed over")
	}
}

// FuzzParse: whatever is said is read or refused.
func FuzzParse(f *testing.F) {
	f.Add([]byte(said))
	f.Fuzz(func(t *testing.T, out []byte) {
		all, err := pending.Parse(out)
		for _, p := range all {
			if err == nil && (p.Name == "" || p.To == "") {
				t.Errorf("%+v", p)
			}
		}
	})
}
