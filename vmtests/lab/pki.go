package lab

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// certLifetime is long for a detached lab that is in use for weeks.
const certLifetime = 365 * 24 * time.Hour

func (l *Lab) pki(file string) string { return filepath.Join(l.Dir, "pki", file) }

// CAFile is the certificate, in PEM, of the lab's certificate authority, which
// has signed the hosts' certificates and those of [Lab.IssueClient]. This and
// the other files are found under the same path inside the hosts.
func (l *Lab) CAFile() string { return l.pki("ca.pem") }

func (l *Lab) caKeyFile() string { return l.pki("ca-key.pem") }

// CertFile is the host's certificate in PEM, good for a server and for a
// client: its common name is the host's name, its alternative names are the
// host's name and address.
func (h *Host) CertFile() string { return h.lab.pki(h.Name + ".pem") }

// KeyFile is the private key (PKCS #8 in PEM) of the host's certificate.
func (h *Host) KeyFile() string { return h.lab.pki(h.Name + "-key.pem") }

// IssueClient makes a client's certificate and key with the given common name,
// signed by the lab's CA, and returns the paths of the two files in PEM. The
// name must be fit for a file's name and not a host's.
func (l *Lab) IssueClient(commonName string) (certFile, keyFile string, err error) {
	if commonName == "" || commonName == "ca" || filepath.Base(commonName) != commonName || l.Host(commonName) != nil {
		return "", "", fmt.Errorf("cannot issue client certificate: invalid common name %q", commonName)
	}
	certFile, keyFile = l.pki(commonName+".pem"), l.pki(commonName+"-key.pem")
	template := leaf(commonName)
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if err := l.issue(template, certFile, keyFile); err != nil {
		return "", "", fmt.Errorf("cannot issue client certificate for %s: %w", commonName, err)
	}
	return certFile, keyFile, nil
}

// makePKI makes the CA and the hosts' certificates.
func (l *Lab) makePKI() error {
	if err := os.Mkdir(l.pki(""), 0o700); err != nil {
		return err
	}
	ca := leaf("Belay lab " + l.Name)
	ca.IsCA = true
	ca.BasicConstraintsValid = true
	ca.KeyUsage = x509.KeyUsageCertSign
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	if err := sign(ca, ca, key, key, l.CAFile(), l.caKeyFile()); err != nil {
		return err
	}
	for _, h := range l.Hosts {
		cert := leaf(h.Name)
		cert.DNSNames = []string{h.Name}
		cert.IPAddresses = []net.IP{h.Addr.AsSlice()}
		// One certificate for both roles: a libvirtd is the client of its
		// peer when it migrates.
		cert.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
		if err := l.issue(cert, h.CertFile(), h.KeyFile()); err != nil {
			return err
		}
	}
	return nil
}

// leaf is the part that all certificates of the lab have in common. libvirt
// and QEMU ask for key encipherment even of keys that cannot do it.
func leaf(commonName string) *x509.Certificate {
	now := time.Now()
	return &x509.Certificate{
		Subject:   pkix.Name{CommonName: commonName},
		NotBefore: now.Add(-time.Hour), // for guests and peers whose clock is behind
		NotAfter:  now.Add(certLifetime),
		KeyUsage:  x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
	}
}

// issue makes a key for the certificate and signs it with the CA's, which it
// reads from the lab's folder: an opened lab can issue too.
func (l *Lab) issue(template *x509.Certificate, certFile, keyFile string) error {
	caDER, err := readPEM(l.CAFile())
	if err != nil {
		return err
	}
	ca, err := x509.ParseCertificate(caDER)
	if err != nil {
		return err
	}
	keyDER, err := readPEM(l.caKeyFile())
	if err != nil {
		return err
	}
	parsed, err := x509.ParsePKCS8PrivateKey(keyDER)
	if err != nil {
		return err
	}
	caKey, ok := parsed.(*ecdsa.PrivateKey)
	if !ok {
		return errors.New("the lab's CA key is of an unknown kind")
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	return sign(template, ca, key, caKey, certFile, keyFile)
}

func sign(template, parent *x509.Certificate, key, parentKey *ecdsa.PrivateKey, certFile, keyFile string) error {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return err
	}
	template.SerialNumber = serial
	cert, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, parentKey)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	if err := writePEM(keyFile, "PRIVATE KEY", der); err != nil {
		return err
	}
	return writePEM(certFile, "CERTIFICATE", cert)
}

func writePEM(path, kind string, der []byte) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}

func readPEM(path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fmt.Errorf("%s holds no PEM", path)
	}
	return block.Bytes, nil
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
