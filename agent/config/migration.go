package config

import (
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"belay/agent/maint"
)

// Migration has the defaults for migrations.
type Migration struct {
	Timeout       Duration `toml:"timeout"`
	BandwidthMiBs uint64   `toml:"bandwidth_mib_s"` // MiB/s; 0 for no limit
	// TLS has everything of a guest that goes to or comes from a peer be encrypted: a
	// migration that would not be is refused, by either host.
	TLS bool `toml:"tls"`
	// Address is this host's own in the network that guests' memory is to come in by;
	// "": where libvirt chooses.
	Address string `toml:"address"`
	// Compression is one of maint.Compressions, "" for none; ZeroCopy has memory sent
	// from where it is. What a guest's QEMU has not is left out.
	Compression string `toml:"compression"`
	ZeroCopy    bool   `toml:"zero_copy"`
	// MaxPause is the longest pause that a copy may end with, and Allow what may be done
	// for one that does not end otherwise.
	MaxPause Duration      `toml:"max_pause"`
	Allow    []maint.Means `toml:"allow"`
	// CopyDisks is whether disks that are not shared are copied along: maint.CopyAll or
	// maint.CopyNone.
	CopyDisks string `toml:"copy_disks"`
}

// MaxTimeout is the longest that an operation on guests may be given.
const MaxTimeout = 24 * time.Hour

// MaxMigrationPause is the longest that a migration's pause may be allowed to be.
const MaxMigrationPause = time.Minute

// Peer is another host that guests may go to.
type Peer struct {
	Address    string `toml:"address"`     // host:port of its belayd
	CertName   string `toml:"cert_name"`   // in its certificate; default: the peer's name
	LibvirtURI string `toml:"libvirt_uri"` // as this host's libvirtd reaches it
	// MigrateURI is where memory goes ("tcp://198.51.100.2"); "": where the peer says, or
	// else its libvirt chooses.
	MigrateURI string `toml:"migrate_uri"`
	// TLSName is the name that its QEMU's certificate has; "": one that the peer says.
	TLSName string `toml:"tls_name"`
}

// maxBandwidth is what a request for a migration may ask for, MiB/s.
const maxBandwidth = 1 << 20

// check refuses what cannot work.
func (m Migration) check(bad func(key, format string, args ...any)) {
	if d := m.Timeout.Duration; d <= 0 {
		bad("migration.timeout", "must be longer than 0")
	} else if d > MaxTimeout {
		bad("migration.timeout", "%s is longer than %s", d, MaxTimeout)
	}
	if m.BandwidthMiBs > maxBandwidth {
		bad("migration.bandwidth_mib_s", "%d is out of range; it is in MiB/s, 0 means no limit", m.BandwidthMiBs)
	}
	if p := m.MaxPause.Duration; p < time.Millisecond || p > MaxMigrationPause {
		bad("migration.max_pause", "%s is not between 1ms and %s", p, MaxMigrationPause)
	}
	if a := m.Address; a != "" && !isAddress(a) {
		bad("migration.address", "%q is not an address of this host, such as 198.51.100.1", a)
	}
	if way := m.Compression; way != "" && !slices.Contains(maint.Compressions, way) {
		bad("migration.compression", "%q is none of %v", way, maint.Compressions)
	}
	switch {
	case m.ZeroCopy && m.TLS:
		bad("migration.zero_copy", "TLS copies what it encrypts; choose one of migration.tls and zero_copy")
	case m.ZeroCopy && m.Compression != "":
		bad("migration.zero_copy", "it sends memory as it is; choose one of migration.compression and zero_copy")
	}
	for _, means := range m.Allow {
		if !slices.Contains(maint.AllMeans, means) {
			bad("migration.allow", "%q is none of %v", means, maint.AllMeans)
		}
	}
	if d := m.CopyDisks; d != maint.CopyAll && d != maint.CopyNone {
		bad("migration.copy_disks", "%q is neither %q nor %q", d, maint.CopyAll, maint.CopyNone)
	}
}

// checkPeers refuses peers that cannot be meant, and fills in what follows from their
// names.
func (c *Config) checkPeers(bad func(key, format string, args ...any)) {
	certs := make(map[string]string) // the peers' names, by cert_name
	for name, p := range c.Peers {
		key := "peers." + name
		if name == c.Host {
			bad(key, "is this host's own name; take it out, or set host")
		}
		if !isName(name) {
			bad("peers", "%q is not a name: it is empty, or has spaces or control characters", name)
		}
		if !isHostPort(p.Address) || strings.HasPrefix(p.Address, ":") || strings.HasSuffix(p.Address, ":0") {
			bad(key+".address", "%q is not host:port", p.Address)
		}
		if u, err := url.Parse(p.LibvirtURI); err != nil || !strings.HasPrefix(u.Scheme, "qemu+") || u.Host == "" {
			bad(key+".libvirt_uri", "%q is not a libvirt URI of another host, such as qemu+tls://%s/system", p.LibvirtURI, name)
		}
		if u, err := url.Parse(p.MigrateURI); p.MigrateURI != "" && (err != nil || u.Scheme == "" || u.Host == "" || !canBePort(u.Port())) {
			bad(key+".migrate_uri", "%q is not a URI that memory can be sent to, such as tcp://198.51.100.2", p.MigrateURI)
		}
		if p.TLSName != "" && !isName(p.TLSName) {
			bad(key+".tls_name", "%q has spaces or control characters", p.TLSName)
		}
		if p.CertName == "" {
			p.CertName = name
			c.Peers[name] = p
		}
		// Who asks is known by this name alone.
		if other, taken := certs[p.CertName]; taken {
			bad("peers", "%s and %s have the same cert_name %q; each needs its own", min(name, other), max(name, other), p.CertName)
		}
		certs[p.CertName] = name
	}
}

// isAddress accepts an address that others can send to.
func isAddress(s string) bool {
	a, err := netip.ParseAddr(s)
	return err == nil && a.Zone() == "" && !a.Is4In6() && !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast()
}

// canBePort accepts one to listen on, and none.
func canBePort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return s == "" || err == nil && n > 0
}
