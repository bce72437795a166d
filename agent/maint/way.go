package maint

import (
	"net/netip"
	"slices"
	"strings"
)

// Way is how a source means to send a guest's memory. The destination judges it.
type Way struct {
	// URI is where the source is configured to send it ("tcp://198.51.100.2"), "" for
	// where the destination says.
	URI string `json:"uri,omitempty"`
	// TLS is that it is encrypted.
	TLS bool `json:"tls,omitempty"`
	// TLSName is the name that the certificate of the destination's QEMU is to have, ""
	// for one that the destination says.
	TLSName string `json:"tls_name,omitempty"`
	// CAs are those that the source's QEMU trusts, as SHA-256 of their certificates in
	// hexadecimal; none where that is not known.
	CAs []string `json:"cas,omitempty"`
}

// Landing is where a destination takes a guest's memory in.
type Landing struct {
	URI     string `json:"uri,omitempty"`      // as of a Way; "" lets its libvirt choose
	Listen  string `json:"listen,omitempty"`   // the one address to listen on; "" leaves it to its qemu.conf
	TLSName string `json:"tls_name,omitempty"` // a name that the certificate of its QEMU has
	// Vigil is its watch over the guest as of now, which has not come yet.
	Vigil Vigil `json:"vigil,omitzero"`
}

// validate says what of a way cannot be meant, "" when all can.
func (w Way) validate() string {
	if w.URI != "" && !plain(w.URI, maxWord) || w.TLSName != "" && !plain(w.TLSName, maxWord) {
		return "its URI or name is too long, or has control characters"
	}
	if len(w.CAs) > maxNeeds || slices.ContainsFunc(w.CAs, func(c string) bool { return !plain(c, maxWord) }) {
		return "its CAs are too many, or none"
	}
	return ""
}

// Validate refuses a landing that a way cannot lead to: memory goes where the source is
// configured to send it, and else to an address, by TCP.
func (l Landing) Validate(w Way) error {
	bad := func(format string, args ...any) error {
		return Problemf(CodePeerRefused, "landing", "see that both hosts have the same Belay", format, args...)
	}
	host, tcp := strings.CutPrefix(l.URI, "tcp://")
	if six, in := strings.CutPrefix(host, "["); tcp && in {
		host, tcp = strings.CutSuffix(six, "]")
	}
	switch {
	case l.URI == "" || l.URI == w.URI:
	case w.URI != "":
		return bad("it takes memory in at %.60q, and not at %s, where it is to be sent to", l.URI, w.URI)
	case !tcp || !isAddress(host):
		return bad("%.60q, where it takes memory in, is not of the form tcp://ADDRESS", l.URI)
	}
	if l.Listen != "" && !isAddress(l.Listen) || l.TLSName != "" && !plain(l.TLSName, maxWord) {
		return bad("%.60q is no address to listen on, or %.60q is no certificate's name", l.Listen, l.TLSName)
	}
	return nil
}

func isAddress(s string) bool {
	a, err := netip.ParseAddr(s)
	return err == nil && a.Zone() == ""
}

// Connection is one by which a guest moves, of its source's QEMU to its destination's.
type Connection struct {
	From netip.AddrPort `json:"from"`
	To   netip.AddrPort `json:"to"`
}

// Connections are what a source says of those of a post-copy: they are to outlive a cut
// network, or are ended, since the source's QEMU has given them up.
type Connections struct {
	All []Connection `json:"all"`
	End bool         `json:"end,omitempty"`
}
