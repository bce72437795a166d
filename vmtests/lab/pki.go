package lab

import (
	"fmt"
	"net"
	"os"
	"path/filepath"

	"belay/vmtests/pki"
)

func (l *Lab) ca() pki.CA { return pki.Open(filepath.Join(l.Dir, "pki")) }

// CAFile is the certificate, in PEM, of the lab's certificate authority, which
// has signed the hosts' certificates and those of [Lab.IssueClient]. This and
// the other files are found under the same path inside the hosts.
func (l *Lab) CAFile() string { return l.ca().CertFile("ca") }

// CertFile is the host's certificate in PEM, good for a server and for a
// client: its common name is the host's name, its alternative names are the
// host's name and address.
func (h *Host) CertFile() string { return h.lab.ca().CertFile(h.Name) }

// KeyFile is the private key (PKCS #8 in PEM) of the host's certificate.
func (h *Host) KeyFile() string { return h.lab.ca().KeyFile(h.Name) }

// IssueClient makes a client's certificate and key with the given common name,
// signed by the lab's CA, and returns the paths of the two files in PEM. The
// name must be fit for a file's name and not a host's.
func (l *Lab) IssueClient(commonName string) (certFile, keyFile string, err error) {
	if l.Host(commonName) != nil {
		return "", "", fmt.Errorf("cannot issue a certificate: %q is a host's name", commonName)
	}
	if err := l.ca().IssueClient(commonName); err != nil {
		return "", "", err
	}
	return l.ca().CertFile(commonName), l.ca().KeyFile(commonName), nil
}

// makePKI makes the CA and the hosts' certificates.
func (l *Lab) makePKI() error {
	dir := filepath.Dir(l.CAFile())
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	ca, err := pki.New(dir, "Belay lab "+l.Name)
	if err != nil {
		return err
	}
	for _, h := range l.Hosts {
		// One certificate for both roles: a libvirtd is the client of its
		// peer when it migrates.
		if err := ca.IssueHost(h.Name, net.IP(h.Addr.AsSlice())); err != nil {
			return err
		}
	}
	return nil
}

// installPKI puts the certificates where libvirt, as server and as client, and
// QEMU look for them. A lab without TLS has none there: a migration that asks
// for TLS fails in it, as it does on hosts that were never given certificates.
func (h *Host) installPKI() error {
	if !h.lab.TLS {
		return nil
	}
	for inside, from := range map[string]string{
		"/etc/pki/CA/cacert.pem":                 h.lab.CAFile(),
		"/etc/pki/libvirt/servercert.pem":        h.CertFile(),
		"/etc/pki/libvirt/private/serverkey.pem": h.KeyFile(),
		"/etc/pki/libvirt/clientcert.pem":        h.CertFile(),
		"/etc/pki/libvirt/private/clientkey.pem": h.KeyFile(),
		"/etc/pki/qemu/ca-cert.pem":              h.lab.CAFile(),
		"/etc/pki/qemu/server-cert.pem":          h.CertFile(),
		"/etc/pki/qemu/server-key.pem":           h.KeyFile(),
		"/etc/pki/qemu/client-cert.pem":          h.CertFile(),
		"/etc/pki/qemu/client-key.pem":           h.KeyFile(),
	} {
		b, err := os.ReadFile(from)
		if err != nil {
			return err
		}
		to := h.Path(inside)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(to, b, 0o600); err != nil {
			return err
		}
	}
	return nil
}
