package vmtests

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/vmtests/cluster"
	"belay/vmtests/lab"
	"belay/vmtests/pki"
)

// Where QEMU and libvirt look for certificates, as roles, certificate and key.
var (
	qemuServer    = [2]string{"/etc/pki/qemu/server-cert.pem", "/etc/pki/qemu/server-key.pem"}
	qemuCA        = "/etc/pki/qemu/ca-cert.pem"
	libvirtClient = [2]string{"/etc/pki/libvirt/clientcert.pem", "/etc/pki/libvirt/private/clientkey.pem"}
)

// Guests move by TLS, called by address, through a network of its own; certificates that
// are not good are found out before the copy, or end it with the guest where it was.
func TestTransport(t *testing.T) {
	t.Parallel()
	b := newBed(t, lab.Config{TLS: true})
	ctx := b.ctx(10 * time.Minute)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(b.Lab.AddMigrationNetwork(ctx))
	set := func(n *cluster.Node, more, peers string) { t.Helper(); b.byTLS(n, more, peers) }
	set(b.a, "compression = 'zstd'\n", "")
	set(b.b, "compression = 'xbzrle'\n", "")
	lan, own := b.received(b.b, lab.Uplink), b.received(b.b, lab.MigrationLink)
	op := b.migrate(b.a, b.b)
	b.isWhole(b.b)
	lan, own = b.received(b.b, lab.Uplink)-lan, b.received(b.b, lab.MigrationLink)-own
	t.Logf("%d MiB sent; %d MiB came by the migration network, %d MiB by the LAN\n%s", op.Move.MemorySent>>20, own>>20, lan>>20, notes(op))
	if own < op.Move.MemorySent || lan > op.Move.MemorySent/4 {
		t.Errorf("the memory did not come by the migration network")
	}
	// What QEMU, or libvirt, has not is left out, and said: libvirt before 9.4 has no zstd.
	if v := b.virsh(b.a, "version"); strings.Contains(v, "libvirt 9.0") && !strings.Contains(notes(op), "left out") {
		t.Errorf("with zstd, the record says %q", notes(op))
	}
	op = b.migrate(b.b, b.a)
	b.isWhole(b.a)
	if strings.Contains(notes(op), "left out") {
		t.Errorf("with xbzrle, the record says %q", notes(op))
	}

	issuer := pki.Open(filepath.Dir(b.Lab.CAFile()))
	must(issuer.IssueHostUntil(time.Now().Add(-time.Hour), "host-late", net.IP(b.b.Addr.AsSlice())))
	install := func(n *cluster.Node, ca pki.CA, name string, to [2]string) {
		t.Helper()
		for from, to := range map[string]string{ca.CertFile(name): to[0], ca.KeyFile(name): to[1]} {
			text, err := os.ReadFile(from)
			must(err)
			must(os.WriteFile(n.Path(to), text, 0o600))
		}
	}
	// try has a migration not come about, for a certificate, with words that name it.
	try := func(name string, outcome maint.Outcome, words ...string) {
		t.Helper()
		op, err := b.a.Client().Migrate(ctx, maint.MigrateRequest{Guest: "web-1", To: b.b.Name})
		must(err)
		op = b.end(b.a, op.ID)
		t.Logf("%s: %s: %v", name, op.Outcome, op.Problems)
		if op.Outcome != outcome || len(op.Problems) == 0 {
			t.Fatalf("%s: %+v", name, op)
		}
		p := op.Problems[0]
		for _, w := range words {
			if p.Code != maint.CodeCertificate || p.Remedy == "" || !strings.Contains(p.Error(), w) {
				t.Errorf("%s: %+v", name, p)
			}
		}
		b.isWhole(b.a)
	}
	install(b.b, issuer, "host-late", qemuServer)
	try("expired", maint.OutcomeBlocked, "host host-b", qemuServer[0], "expired at")
	install(b.b, issuer, "host-b", qemuServer)

	set(b.a, "", "tls_name = 'host-z'\n")
	try("another's name", maint.OutcomeBlocked, qemuServer[0], "is for host-b", "not for host-z")
	set(b.a, "", "")

	install(b.a, issuer, "host-late", libvirtClient)
	try("libvirt's own, expired", maint.OutcomeBlocked, "host host-a", libvirtClient[0], "expired at")
	install(b.a, issuer, "host-a", libvirtClient)

	stranger, err := pki.New(t.TempDir(), "another CA")
	must(err)
	must(stranger.IssueHost("host-b", net.IP(b.b.Addr.AsSlice())))
	install(b.b, stranger, "host-b", qemuServer)
	install(b.b, stranger, "ca", [2]string{qemuCA, qemuCA + ".key"})
	try("of another CA", maint.OutcomeBlocked, "host host-b", qemuServer[0], "does not trust on the source")
	install(b.b, issuer, "ca", [2]string{qemuCA, qemuCA + ".key"})
	install(b.b, issuer, "host-b", qemuServer)
	text, err := os.ReadFile(stranger.KeyFile("host-b"))
	must(err)
	must(os.WriteFile(b.b.Path(qemuServer[1]), text, 0o600))
	try("with another's key", maint.OutcomeFailed, "certificate") // QEMU finds that out

	install(b.b, issuer, "host-b", qemuServer)
	install(b.b, issuer, "ca", [2]string{qemuCA, qemuCA + ".key"})
	b.migrate(b.a, b.b)
	b.isWhole(b.b)
}

// A disk that goes along takes the same way as memory; here it is an overlay.
func TestDiskByTransport(t *testing.T) {
	t.Parallel()
	b := newBed(t, lab.Config{TLS: true}, ownDisk("web-1.qcow2", "base.raw"))
	if err := b.Lab.AddMigrationNetwork(b.ctx(time.Minute)); err != nil {
		t.Fatal(err)
	}
	b.fill(b.a)
	for _, n := range b.Nodes {
		b.byTLS(n, "", "")
	}
	lan, own := b.received(b.b, lab.Uplink), b.received(b.b, lab.MigrationLink)
	stop := b.scribble(b.a, 2*time.Second)
	op := b.migrate(b.a, b.b, "--copy-disks", "--timeout", "90s")
	last := stop()
	b.isWhole(b.b)
	b.diskIsWhole(b.b, b.a, filepath.Join(imagesDir, "web-1.qcow2"), last)
	lan, own = b.received(b.b, lab.Uplink)-lan, b.received(b.b, lab.MigrationLink)-own
	t.Logf("%d MiB of memory sent; %d MiB came by the migration network, %d MiB by the LAN\n%s", op.Move.MemorySent>>20, own>>20, lan>>20, notes(op))
	if own < op.Move.MemorySent+writtenMiB<<20 || lan > writtenMiB<<20/4 {
		t.Errorf("the disk did not come by the migration network")
	}
}

// byTLS starts a host's belayd anew, to migrate by TLS and the migration network.
func (b *bed) byTLS(n *cluster.Node, more, peers string) {
	b.t.Helper()
	if err := n.Stop(); err != nil {
		b.t.Fatal(err)
	}
	n.ByAddress, n.PeerSettings = true, peers
	n.Settings = fmt.Sprintf("[migration]\ntls = true\naddress = %q\n%s", n.MigrationAddr(), more)
	if err := n.Start(b.ctx(time.Minute)); err != nil {
		b.t.Fatal(err)
	}
}

// notes are what the steps of an operation wrote down.
func notes(op maint.Op) string {
	var all []string
	for _, s := range op.Steps {
		all = append(all, s.Notes...)
	}
	return strings.Join(all, "\n")
}

// received is how many bytes have come in by a link of a host.
func (b *bed) received(n *cluster.Node, link string) uint64 {
	b.t.Helper()
	out, err := n.Command(b.ctx(time.Minute), "cat", "/proc/net/dev").Output()
	if err != nil {
		b.t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		name, counts, _ := strings.Cut(strings.TrimSpace(line), ":")
		if f := strings.Fields(counts); name == link && len(f) > 0 {
			bytes, err := strconv.ParseUint(f[0], 10, 64)
			if err != nil {
				b.t.Fatal(err)
			}
			return bytes
		}
	}
	b.t.Fatalf("%s has no link %s:\n%s", n.Name, link, out)
	return 0
}
