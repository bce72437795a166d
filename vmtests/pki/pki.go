// Package pki makes small certificate authorities for labs and tests.
package pki

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

// lifetime is long for a lab that is in use for weeks.
const lifetime = 365 * 24 * time.Hour

// CA is a certificate authority whose files, and those of what it issues, are
// PEM files in a folder: NAME.pem and NAME-key.pem, "ca" for its own.
type CA struct{ dir string }

// New makes a CA in dir, which must exist.
func New(dir, commonName string) (CA, error) {
	c := CA{dir}
	t := template(commonName)
	t.IsCA, t.BasicConstraintsValid, t.KeyUsage = true, true, x509.KeyUsageCertSign
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return c, err
	}
	return c, c.sign(t, t, key, key, "ca")
}

// Open returns the CA that New made in dir.
func Open(dir string) CA { return CA{dir} }

// CertFile and KeyFile are the files of what was issued to name; "ca" names
// the CA itself.
func (c CA) CertFile(name string) string { return filepath.Join(c.dir, name+".pem") }

// KeyFile is the PKCS #8 private key; see CertFile.
func (c CA) KeyFile(name string) string { return filepath.Join(c.dir, name+"-key.pem") }

// IssueHost makes a certificate for a server that is also a client of its
// peers, good for name and the addresses.
func (c CA) IssueHost(name string, addrs ...net.IP) error {
	return c.IssueHostUntil(time.Now().Add(lifetime), name, addrs...)
}

// IssueHostUntil is IssueHost of a certificate that ends at a time, which may have been
// before.
func (c CA) IssueHostUntil(end time.Time, name string, addrs ...net.IP) error {
	t := template(name)
	if t.NotAfter = end; end.Before(t.NotBefore) {
		t.NotBefore = end.Add(-time.Hour)
	}
	t.DNSNames, t.IPAddresses = []string{name}, addrs
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	return c.issue(t, name)
}

// IssueClient makes a client's certificate. The name must be fit for a file's.
func (c CA) IssueClient(name string) error {
	if name == "" || name == "ca" || filepath.Base(name) != name {
		return fmt.Errorf("cannot issue a certificate: %q is no common name for a client", name)
	}
	t := template(name)
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	return c.issue(t, name)
}

// template is what all certificates have in common. libvirt and QEMU ask for
// key encipherment even of keys that cannot do it.
func template(commonName string) *x509.Certificate {
	now := time.Now()
	return &x509.Certificate{
		Subject:   pkix.Name{CommonName: commonName},
		NotBefore: now.Add(-time.Hour), // for a peer whose clock is behind
		NotAfter:  now.Add(lifetime),
		KeyUsage:  x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
	}
}

// issue reads the CA from its folder: an opened CA can issue too.
func (c CA) issue(t *x509.Certificate, name string) error {
	caDER, err := readPEM(c.CertFile("ca"))
	if err != nil {
		return err
	}
	ca, err := x509.ParseCertificate(caDER)
	if err != nil {
		return err
	}
	keyDER, err := readPEM(c.KeyFile("ca"))
	if err != nil {
		return err
	}
	parsed, err := x509.ParsePKCS8PrivateKey(keyDER)
	if err != nil {
		return err
	}
	caKey, ok := parsed.(*ecdsa.PrivateKey)
	if !ok {
		return errors.New("the CA's key is of an unknown kind")
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	return c.sign(t, ca, key, caKey, name)
}

func (c CA) sign(t, parent *x509.Certificate, key, parentKey *ecdsa.PrivateKey, name string) error {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return err
	}
	t.SerialNumber = serial
	der, err := x509.CreateCertificate(rand.Reader, t, parent, &key.PublicKey, parentKey)
	if err != nil {
		return err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	if err := writePEM(c.KeyFile(name), "PRIVATE KEY", keyDER); err != nil {
		return err
	}
	return writePEM(c.CertFile(name), "CERTIFICATE", der)
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
		return nil, fmt.Errorf("%s has no PEM block", path)
	}
	return block.Bytes, nil
}
