package config

import (
	"net"
	"net/netip"
	"slices"
)

// Page says where the status page is served.
type Page struct {
	Listen string `toml:"listen"` // host:port on loopback; "" for none
}

// check refuses a page that more could read than may look.
func (p Page) check(viewers []string, bad func(key, format string, args ...any)) {
	if p.Listen == "" {
		return
	}
	host, _, _ := net.SplitHostPort(p.Listen)
	address, err := netip.ParseAddr(host)
	switch {
	case !isHostPort(p.Listen):
		bad("page.listen", "%q is not host:port", p.Listen)
	case err != nil || !address.IsLoopback():
		bad("page.listen", "%q is not on loopback, such as 127.0.0.1:9478: the page is plain HTTP for this host alone (from elsewhere: ssh -L 9478:127.0.0.1:9478 HOST)", p.Listen)
	case !slices.Contains(viewers, "*"):
		bad("page.listen", "every user of this host can read a port on loopback, and access.viewers is not for all; have \"*\" among them, or serve no page")
	}
}
