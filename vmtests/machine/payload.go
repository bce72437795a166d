package machine

import (
	"context"
	_ "embed"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"

	"belay/vmtests/guest"
	"belay/vmtests/pki"
	"belay/vmtests/program"
)

//go:embed provision.sh
var provisionScript []byte

//go:embed box.sh
var boxScript string

// fillPayload puts into a folder what hosts are provisioned with: provision.sh, certificates of
// a CA of their own, Belay's package, and their guests' image.
func fillPayload(dir string, hosts map[string]netip.Addr, g guest.Image, deb string) error {
	ca, err := pki.New(dir, "Belay lab")
	if err != nil {
		return err
	}
	for name, addr := range hosts {
		if err := ca.IssueHost(name, net.IP(addr.AsSlice())); err != nil {
			return err
		}
	}
	if err := os.Remove(ca.KeyFile("ca")); err != nil { // no host has that
		return err
	}
	for from, to := range map[string]string{g.Kernel: "guest/vmlinuz", g.Initrd: "guest/initrd", deb: filepath.Base(deb)} {
		if err := copyFile(from, filepath.Join(dir, to)); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(dir, "provision.sh"), provisionScript, 0o755)
}

func copyFile(from, to string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o644)
}

// Box makes a box for Vagrant of the hosts' image in a folder, with the kernel it boots with
// and, in payload, what hosts of that many names (host-a and so on) are provisioned with.
func Box(ctx context.Context, dir string, hosts int, log *slog.Logger) error {
	img, err := Build(ctx, guest.DefaultCache(), log)
	if err != nil {
		return err
	}
	g, err := guest.Build(ctx, guest.DefaultCache(), log)
	if err != nil {
		return err
	}
	payload := filepath.Join(dir, "payload")
	if err := os.RemoveAll(payload); err != nil {
		return err
	}
	if err := os.MkdirAll(payload, 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp("", "belay-box-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	deb, err := BuildPackage(ctx, tmp, "")
	if err != nil {
		return err
	}
	names := map[string]netip.Addr{}
	for i := range hosts {
		names[hostName(i)] = hostAddr(i)
	}
	if err := fillPayload(payload, names, g, deb); err != nil {
		return err
	}
	_, err = program.Output(ctx, "", "sh", "-c", boxScript, "box.sh", img.Dir, dir)
	return err
}
