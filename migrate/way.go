package migrate

import (
	"context"
	"crypto/x509"
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"belay/agent/maint"
)

// Pathfinder knows the source's end of the way to the destination.
type Pathfinder interface {
	// CheckWay lists what this host itself can tell stands in the way: its certificates,
	// and those of the libvirt that it would speak to.
	CheckWay(ctx context.Context, from, to string, p maint.MoveParams) []maint.Problem
	// Trusts are the CAs that this host's QEMU trusts; see maint.Way.
	Trusts() []string
	// Reaches returns nil if this host has a route to an address.
	Reaches(a netip.Addr) error
}

// Wiring is what a host has for the memory of guests that come and go.
type Wiring struct {
	Addresses   []netip.Addr     // its own
	Listening   []netip.AddrPort // where somebody listens
	First, Last uint16           // the ports of which libvirt picks one
	Server      Certificate      // of its QEMU, for guests that come
}

// Certificate is one that a host shows to others.
type Certificate struct {
	File string // where it is
	// Fault is why no peer would accept it, "" for nothing that is known; Remedy is what
	// lifts that.
	Fault, Remedy string
	Leaf          *x509.Certificate // nil where it could not be read
	// Issuers are those above it, of whom one is to be trusted; see maint.Way.
	Issuers []string
}

// Until is when it ends, zero where that is not known.
func (c Certificate) Until() time.Time {
	if c.Leaf == nil {
		return time.Time{}
	}
	return c.Leaf.NotAfter
}

// Names are the names and addresses that it is for. A certificate that says nothing of
// them is for its common name.
func (c Certificate) Names() (names []string) {
	if c.Leaf == nil {
		return nil
	}
	names = slices.Clone(c.Leaf.DNSNames)
	for _, a := range c.Leaf.IPAddresses {
		names = append(names, a.String())
	}
	if len(names) == 0 && c.Leaf.Subject.CommonName != "" {
		names = append(names, c.Leaf.Subject.CommonName)
	}
	return names
}

// IsFor reports whether it is for a host of that name or address, as far as is known.
func (c Certificate) IsFor(name string) bool {
	return c.Leaf == nil || c.Leaf.VerifyHostname(name) == nil || slices.Contains(c.Names(), name)
}

// Gate is what a destination demands of the way that memory comes.
type Gate struct {
	Host    string
	TLS     bool       // it must be encrypted
	Address netip.Addr // of its own, in the network that is for it; zero where there is none
}

// CheckWay judges how a guest's memory is to come, nil where its source does not say, and
// tells where it is taken in.
func (g Gate) CheckWay(w *maint.Way, here Wiring) (l maint.Landing, ps []maint.Problem) {
	add := func(code maint.Code, remedy, format string, args ...any) {
		ps = append(ps, *maint.Problemf(code, "host "+g.Host, remedy, format, args...))
	}
	if g.TLS && w == nil {
		add(maint.CodeTLS, "update belayd on the source", "takes guests' memory with TLS only (migration.tls), and the source is too old to say that it uses it")
	} else if g.TLS && !w.TLS {
		add(maint.CodeTLS, "set migration.tls on the source too", "takes guests' memory with TLS only (migration.tls), and the source would send it without")
	}
	if w == nil {
		return l, ps
	}
	setting := fmt.Sprintf("peers.%s.migrate_uri on the source", g.Host)
	if l.URI = w.URI; l.URI == "" && g.Address.IsValid() {
		l.URI, setting = tcpURI(g.Address), "migration.address there"
	}
	host, port, err := tcpAddress(l.URI)
	if address, errAddr := netip.ParseAddr(host); l.URI != "" && err == nil && errAddr == nil {
		l.Listen = address.String()
		if !slices.Contains(here.Addresses, address) {
			add(maint.CodeMigrationNetwork, "set "+setting+" to an address that it has (ip address)",
				"has no address %s, where guests' memory is to come in", address)
		}
	}
	if first, last := here.First, here.Last; port != 0 {
		if taken(here.Listening, l.Listen, port) {
			add(maint.CodePort, "leave the port out of "+setting+", for libvirt to choose", "somebody listens on port %d there, where guests' memory is to come in", port)
		}
	} else if first != 0 && !slices.ContainsFunc(span(first, last), func(p uint16) bool { return !taken(here.Listening, l.Listen, p) }) {
		add(maint.CodePort, "wait until guests have arrived that are on their way, or widen migration_port_min and migration_port_max in its qemu.conf",
			"all of its ports for migrations, %d to %d, are taken", first, last)
	}
	if !w.TLS {
		return l, ps
	}
	switch c := here.Server; {
	case c.Fault != "":
		add(maint.CodeCertificate, c.Remedy, "QEMU's certificate %s %s", c.File, c.Fault)
	case w.TLSName != "" && !c.IsFor(w.TLSName):
		add(maint.CodeCertificate, fmt.Sprintf("set peers.%s.tls_name on the source to one of these, or have a certificate issued for that name", g.Host),
			"QEMU's certificate %s is for %s, and not for %s", c.File, strings.Join(c.Names(), ", "), w.TLSName)
	case len(w.CAs) > 0 && len(c.Issuers) > 0 && !slices.ContainsFunc(c.Issuers, func(i string) bool { return slices.Contains(w.CAs, i) }):
		add(maint.CodeCertificate, "have QEMU's certificates of both hosts issued by one CA, or add that CA to ca-cert.pem on the source", "QEMU's certificate %s is of a CA that QEMU does not trust on the source", c.File)
	case w.TLSName != "":
		l.TLSName = w.TLSName
	default:
		if names := c.Names(); len(names) > 0 {
			l.TLSName = names[0]
		}
	}
	return l, ps
}

// span are the ports from first to last.
func span(first, last uint16) (ports []uint16) {
	for p := int(first); p <= int(last); p++ {
		ports = append(ports, uint16(p))
	}
	return ports
}

// taken reports whether somebody listens on a port of that address, "" for all.
func taken(listening []netip.AddrPort, address string, port uint16) bool {
	return slices.ContainsFunc(listening, func(l netip.AddrPort) bool {
		return l.Port() == port && (address == "" || l.Addr().IsUnspecified() || l.Addr().String() == address)
	})
}

// encrypted are the transports of libvirt's URIs that are.
var encrypted = []string{"qemu+tls", "qemu+ssh", "qemu+libssh", "qemu+libssh2"}

// plain is what of the way is not encrypted although all of it must be.
func (m *Migration) plain() (ps []maint.Problem) {
	if !m.Params.TLS {
		return nil
	}
	return PlainWay(m.To, m.Params)
}

// PlainWay is what of the way to a peer TLS cannot cover, or is not to.
func PlainWay(to string, p maint.MoveParams) (ps []maint.Problem) {
	if u, err := url.Parse(p.DestURI); err != nil || !slices.Contains(encrypted, u.Scheme) {
		ps = append(ps, *maint.Problemf(maint.CodeTLS, "peer "+to, "use qemu+tls://, or qemu+ssh://, in peers."+to+".libvirt_uri",
			"guests' definitions would go to %s in the clear, which migration.tls forbids", p.DestURI))
	}
	if _, _, err := tcpAddress(p.MigrateURI); p.MigrateURI != "" && err != nil {
		ps = append(ps, *maint.Problemf(maint.CodeTLS, "peer "+to, "use tcp://ADDRESS in peers."+to+".migrate_uri",
			"guests' memory goes with TLS over TCP only, which migration.tls demands, and not to %s", p.MigrateURI))
	}
	return ps
}

// reserve has the peer keep room, and learns where the memory goes.
func (m *Migration) reserve(ctx context.Context, a maint.Arrival) error {
	l, err := m.Destination.Reserve(ctx, a)
	if err != nil {
		return err
	}
	if err := l.Validate(maint.Way{URI: m.Params.MigrateURI}); err != nil {
		return fmt.Errorf("peer %s: %w", m.To, err)
	}
	m.landing = l
	host, _, err := tcpAddress(l.URI)
	if l.URI == "" || err != nil {
		return nil // a name is libvirt's to resolve
	}
	if address, err := netip.ParseAddr(host); err == nil {
		if err := m.Source.Reaches(address); err != nil {
			return maint.Problemf(maint.CodeMigrationNetwork, "host "+m.From, fmt.Sprintf("give it an address in that network, or correct peers.%s.migrate_uri here or migration.address there", m.To),
				"has no way to %s, where %s takes guests' memory in: %v", address, m.To, err)
		}
	}
	return nil
}

// land has a copy go where the peer takes it in.
func (m *Migration) land(p maint.MoveParams) maint.MoveParams {
	if m.landing.URI != "" {
		p.MigrateURI, p.Listen = m.landing.URI, m.landing.Listen
	}
	if p.TLS && p.TLSName == "" {
		p.TLSName = m.landing.TLSName
	}
	return p
}

// equip decides which of the wanted ways to send memory faster the guest's QEMU has. What
// it has not is left out, and said.
func (m *Migration) equip(ctx context.Context, s Scratch, p maint.MoveParams) (maint.MoveParams, error) {
	if p.Compression == "" && !p.ZeroCopy {
		return p, nil
	}
	has, err := m.Source.MoveSupport(ctx, m.UUID)
	if err != nil {
		m.Log.Warn("a guest's QEMU cannot be asked what it can do", "guest", m.Guest, "err", err)
	}
	p, without := able(p, has, err)
	for _, why := range without {
		if err := s.Note("%s", why); err != nil {
			return p, err
		}
	}
	return p, nil
}

// able takes out of p what a QEMU cannot do, and what excludes each other; err is why it
// could not be asked.
func able(p maint.MoveParams, has maint.MoveSupport, err error) (_ maint.MoveParams, without []string) {
	can := func(c string) bool { return slices.Contains(has.Capabilities, c) }
	why := "the guest's QEMU cannot do it"
	if err != nil {
		why = "the guest's QEMU could not be asked whether it can do it"
	}
	drop := func(what, why string) { without = append(without, what+" is left out: "+why) }
	if p.ZeroCopy {
		switch {
		case !can("zero-copy-send") || !can("multifd"):
			p.ZeroCopy = false
			drop("zero-copy", why)
		case p.TLS:
			p.ZeroCopy = false
			drop("zero-copy", "TLS copies what it encrypts")
		default:
			p.Parallel = max(p.Parallel, connections)
		}
	}
	switch c := p.Compression; c {
	case "":
	case maint.CompressXBZRLE:
		switch {
		case !can("xbzrle"):
			p.Compression = ""
			drop("compression "+c, why)
		case p.Parallel > 0:
			p.Compression = ""
			drop("compression "+c, "it is for one connection, and this copy has several")
		}
	default:
		switch {
		case p.ZeroCopy:
			p.Compression = ""
			drop("compression "+c, "zero-copy sends memory as it is")
		case !slices.Contains(has.Multifd, c) || !can("multifd"):
			p.Compression = ""
			drop("compression "+c, why)
		default:
			p.Parallel = max(p.Parallel, connections)
		}
	}
	return p, without
}

// tcpAddress reads a migration's URI: the host, and the port where it has one.
func tcpAddress(uri string) (host string, port uint16, err error) {
	u, err := url.Parse(uri)
	if err != nil || u.Scheme != "tcp" || u.Hostname() == "" {
		return "", 0, fmt.Errorf("%q is not of the form tcp://ADDRESS or tcp://ADDRESS:PORT", uri)
	}
	if text := u.Port(); text != "" {
		n, err := strconv.ParseUint(text, 10, 16)
		if err != nil || n == 0 {
			return "", 0, fmt.Errorf("%q has no port that can be listened on", uri)
		}
		port = uint16(n)
	}
	return u.Hostname(), port, nil
}

// tcpURI is where memory goes that is for an address.
func tcpURI(a netip.Addr) string {
	if a.Is6() {
		return "tcp://[" + a.String() + "]"
	}
	return "tcp://" + a.String()
}
