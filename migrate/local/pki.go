package local

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"belay/migrate"
)

// certificate looks at a certificate of this host, as its peers will. What belayd may not
// read is left to them.
func (h *Host) certificate(file, key, ca string) migrate.Certificate {
	c := migrate.Certificate{File: file}
	fault := func(text, remedy string) migrate.Certificate {
		c.Fault, c.Remedy = text, remedy
		return c
	}
	text, err := os.ReadFile(h.at(file))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fault("is not there", "put one for this host there, with its key ("+key+") and its CA's ("+ca+")")
	case err != nil:
		return c
	}
	chain := parse(text)
	if len(chain) == 0 {
		return fault("is none that can be read", "put a certificate in PEM there")
	}
	c.Leaf = chain[0]
	roots, err := os.ReadFile(h.at(ca))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fault("comes without its CA's, "+ca, "put that there")
	case err != nil:
		return c
	}
	if !h.there(key) {
		return fault("comes without its key, "+key, "put that there")
	}
	c.Fault, c.Remedy = judge(chain, parse(roots), ca, h.now())
	c.Issuers = issuers(chain, parse(roots), h.now())
	return c
}

// judge says why nobody would accept a certificate who trusts the CA in the file ca, and
// what lifts that.
func judge(chain, roots []*x509.Certificate, ca string, now time.Time) (fault, remedy string) {
	leaf, until := chain[0], func(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 MST") }
	switch {
	case now.After(leaf.NotAfter):
		return "expired at " + until(leaf.NotAfter), "renew it"
	case now.Before(leaf.NotBefore):
		return "is not valid before " + until(leaf.NotBefore), "see that the host's clock is right, or renew it"
	}
	for _, r := range roots {
		if now.After(r.NotAfter) {
			return "is of a CA whose own certificate, " + ca + ", expired at " + until(r.NotAfter), "renew the CA's certificate, on all hosts"
		}
	}
	_, err := verify(chain, roots, now)
	if unknown := (x509.UnknownAuthorityError{}); errors.As(err, &unknown) {
		return "was not issued by the CA in " + ca, "have one issued by the CA that all hosts trust"
	}
	return "", "" // of what else there can be, libvirt and QEMU have their own opinion
}

func verify(chain, roots []*x509.Certificate, now time.Time) ([][]*x509.Certificate, error) {
	pool, between := x509.NewCertPool(), x509.NewCertPool()
	for _, r := range roots {
		pool.AddCert(r)
	}
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	return chain[0].Verify(x509.VerifyOptions{Roots: pool, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
}

// issuers are all above a certificate, by their fingerprints.
func issuers(chain, roots []*x509.Certificate, now time.Time) (above []string) {
	found, _ := verify(chain, roots, now) // none where it fails, which is said elsewhere
	for _, chain := range found {
		for _, c := range chain[1:] {
			above = append(above, fingerprint(c))
		}
	}
	return above
}

func fingerprint(c *x509.Certificate) string { return fmt.Sprintf("%x", sha256.Sum256(c.Raw)) }

// parse reads all certificates of a PEM file.
func parse(text []byte) (all []*x509.Certificate) {
	for {
		block, rest := pem.Decode(text)
		if block == nil {
			return all
		}
		if c, err := x509.ParseCertificate(block.Bytes); err == nil {
			all = append(all, c)
		}
		text = rest
	}
}
