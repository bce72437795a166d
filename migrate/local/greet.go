package local

import (
	"cmp"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"belay/agent/maint"
	"belay/migrate"
)

const (
	libvirtPKI = "/etc/pki/libvirt"
	libvirtCA  = "/etc/pki/CA/cacert.pem"
	tlsPort    = "16514"
	// greetWait bounds a greeting of a peer's libvirt.
	greetWait = 3 * time.Second
	// accepted is what libvirt says to a client whose certificate it accepts, before
	// anything else.
	accepted = 1
)

// CheckWay lists what this host itself can tell stands in the way of a migration: its
// certificates, and how the peer's libvirt takes them.
func (h *Host) CheckWay(ctx context.Context, from, to string, p maint.MoveParams) (ps []maint.Problem) {
	if c := h.Client(); p.TLS && c.Fault != "" {
		ps = append(ps, *maint.Problemf(maint.CodeCertificate, "host "+from, c.Remedy, "QEMU's certificate %s %s", c.File, c.Fault))
	}
	if _, problem := h.GreetLibvirt(ctx, from, to, p.DestURI); problem != nil {
		ps = append(ps, *problem)
	}
	return ps
}

// Reaches returns nil if this host has a route to an address. It sends nothing.
func (h *Host) Reaches(a netip.Addr) error {
	conn, err := net.Dial("udp", netip.AddrPortFrom(a, firstPort).String()) // only connect(2)
	if err != nil {
		return err
	}
	return conn.Close()
}

// GreetLibvirt speaks with the libvirt of a peer as this host's would before a migration:
// TLS, and what that libvirt says of this host's certificate. It gives that host's
// certificate. A URI that is not of TLS is left to libvirt.
//
// Source: libvirt's remote URIs and TLS certificates; virNetTLSContextCheckCertificate and
// the byte that follows (virNetServerClient).
func (h *Host) GreetLibvirt(ctx context.Context, from, to, uri string) (theirs migrate.Certificate, p *maint.Problem) {
	u, err := url.Parse(uri)
	if err != nil || u.Scheme != "qemu+tls" {
		return theirs, nil
	}
	ca, cert, key := libvirtCA, filepath.Join(libvirtPKI, "clientcert.pem"), filepath.Join(libvirtPKI, "private/clientkey.pem")
	if dir := u.Query().Get("pkipath"); dir != "" {
		ca, cert, key = filepath.Join(dir, "cacert.pem"), filepath.Join(dir, "clientcert.pem"), filepath.Join(dir, "clientkey.pem")
	}
	roots, err := os.ReadFile(h.at(ca))
	if os.IsPermission(err) {
		return theirs, nil // it is libvirt's, and not for belayd to see
	}
	ours := h.certificate(cert, key, ca)
	if ours.Fault != "" {
		return theirs, maint.Problemf(maint.CodeCertificate, "host "+from, ours.Remedy, "libvirt's certificate %s, by which %s knows this host, %s", cert, to, ours.Fault)
	}
	config := &tls.Config{InsecureSkipVerify: true} // judged below, as libvirt does
	if pair, err := tls.LoadX509KeyPair(h.at(cert), h.at(key)); err == nil {
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	} else {
		return theirs, nil
	}
	ctx, cancel := context.WithTimeout(ctx, greetWait)
	defer cancel()
	at := net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), tlsPort))
	raw, err := new(net.Dialer).DialContext(ctx, "tcp", at)
	if err != nil {
		return theirs, maint.Problemf(maint.CodePeerDown, "peer "+to,
			"enable libvirt's TLS socket there (systemctl enable --now libvirtd-tls.socket), open the port, and see that the name resolves here", "its libvirt cannot be reached at %s: %v", uri, err)
	}
	defer raw.Close()
	if d, ok := ctx.Deadline(); ok {
		_ = raw.SetDeadline(d) // a connection that is closed fails below
	}
	conn := tls.Client(raw, config)
	if err := conn.HandshakeContext(ctx); ctx.Err() != nil {
		return theirs, maint.Problemf(maint.CodePeerDown, "peer "+to, "see there what libvirt waits for", "its libvirt does not answer at %s within %s", uri, greetWait)
	} else if err != nil {
		return theirs, refusedUs(to, cert, fmt.Sprintf("TLS with its libvirt at %s fails: %v", uri, err))
	}
	chain := conn.ConnectionState().PeerCertificates
	theirs = migrate.Certificate{File: "of libvirt on " + to, Leaf: chain[0]}
	const where = "/etc/pki/libvirt/servercert.pem there, and libvirt restarted"
	if u.Query().Get("no_verify") != "1" {
		if theirs.Fault, theirs.Remedy = judge(chain, parse(roots), ca, h.now()); theirs.Fault != "" {
			return theirs, maint.Problemf(maint.CodeCertificate, "peer "+to, theirs.Remedy+": "+where, "the certificate of its libvirt %s", theirs.Fault)
		}
		if !theirs.IsFor(u.Hostname()) {
			return theirs, maint.Problemf(maint.CodeCertificate, "peer "+to,
				fmt.Sprintf("use such a name in peers.%s.libvirt_uri, and have it resolve here (/etc/hosts), or have a certificate issued for %s: %s", to, u.Hostname(), where),
				"the certificate of its libvirt is for %s, and not for %s", strings.Join(theirs.Names(), ", "), u.Hostname())
		}
	}
	var word [1]byte
	if _, err := io.ReadFull(conn, word[:]); err != nil || word[0] != accepted {
		return theirs, refusedUs(to, cert, fmt.Sprintf("its libvirt at %s does not accept this host's certificate %s (%s)", uri, cert, ours.Leaf.Subject))
	}
	return theirs, nil
}

// refusedUs is a libvirt's refusal of this host.
func refusedUs(to, cert, text string) *maint.Problem {
	return maint.Problemf(maint.CodeCertificate, "peer "+to,
		"have that libvirt trust the CA of "+cert+" ("+libvirtCA+" there) and allow its subject (tls_allowed_dn_list in libvirtd.conf or virtproxyd.conf there); its log says what it refused", "%s", text)
}
