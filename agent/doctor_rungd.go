package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"sync"
	"time"

	"belay/agent/maint"
	"belay/hypervisor"
	"belay/migrate"
)

// dialWait bounds how long a peer's libvirt may take to accept a connection.
const dialWait = 3 * time.Second

// doctorD is what is missing for migrations.
func (a *Agent) doctorD(ctx context.Context, here maint.Host) []maint.Check {
	names := a.peerNames()
	found := make([][]maint.Check, len(names))
	var wg sync.WaitGroup
	for i, name := range names {
		wg.Go(func() { found[i] = a.doctorPeer(ctx, a.peers[name], here) })
	}
	checks := append(a.checkWiring(), checkHold())
	wg.Wait()
	for _, f := range found {
		checks = append(checks, f...)
	}
	return checks
}

// checkWiring looks at where guests' memory comes in, and at the certificates with which
// it does.
func (a *Agent) checkWiring() (checks []maint.Check) {
	wiring, gate := a.local.Wiring(), a.gate()
	where := "where libvirt chooses"
	if gate.Address.IsValid() {
		where = "at " + gate.Address.String()
	}
	_, problems := gate.CheckWay(&maint.Way{TLS: gate.TLS}, without(wiring))
	network := maint.Check{Rung: "D", Name: "migration network", Result: maint.CheckOK, Text: fmt.Sprintf("guests' memory comes in %s, ports %d to %d", where, wiring.First, wiring.Last)}
	for _, p := range problems {
		if p.Code != maint.CodeCertificate && network.Result == maint.CheckOK {
			network.Result, network.Text, network.Remedy = maint.CheckFail, "this host "+p.Reason, p.Remedy
		}
	}
	checks = append(checks, network)
	if !gate.TLS {
		return append(checks, maint.Check{Rung: "D", Name: "migration TLS", Result: maint.CheckWarn, Text: "guests' memory goes through the network in the clear",
			Remedy: "set migration.tls on all hosts, unless that network is only theirs"})
	}
	return append(checks, checkCertificate("incoming", wiring.Server), checkCertificate("outgoing", a.local.Client()), a.checkForced())
}

// checkHold sees whether the connection of a post-copy is kept through a cut network.
func checkHold() maint.Check {
	c := maint.Check{Rung: "D", Name: "post-copy", Result: maint.CheckOK, Text: "its connection is kept through a cut network"}
	if err := hypervisor.MayHold(); err != nil {
		c.Result, c.Text = maint.CheckWarn, fmt.Sprintf("its connection is lost when the network is cut for some minutes, and QEMU may not be able to take it up again: %v", err)
		c.Remedy = "take belayd.service of this version (CAP_SYS_PTRACE, and pidfd_getfd in SystemCallFilter), or do not allow postcopy; Linux before 5.6 cannot do it"
	}
	return c
}

// without is a host's wiring without certificates.
func without(w migrate.Wiring) migrate.Wiring {
	w.Server = migrate.Certificate{}
	return w
}

// checkForced sees whether libvirt too refuses what is not encrypted.
func (a *Agent) checkForced() maint.Check {
	c := maint.Check{Rung: "D", Name: "migration TLS forced", Result: maint.CheckOK, Text: "by belayd and by libvirt"}
	if !a.local.ForcesTLS() {
		c.Result, c.Text = maint.CheckWarn, "by belayd, while libvirt takes guests without TLS from others (virsh migrate)"
		c.Remedy = "set migrate_tls_force = 1 in /etc/libvirt/qemu.conf and restart libvirt"
	}
	return c
}

func checkCertificate(role string, c migrate.Certificate) maint.Check {
	k := maint.Check{Rung: "D", Name: "migration TLS, " + role, Result: maint.CheckOK}
	switch {
	case c.Fault != "":
		k.Result, k.Text, k.Remedy = maint.CheckFail, fmt.Sprintf("QEMU's certificate %s %s", c.File, c.Fault), c.Remedy
	case c.Leaf == nil:
		k.Result, k.Text = maint.CheckNA, c.File+" is not there, or belayd may not read it"
	case time.Until(c.Until()) < certWarn:
		k.Result, k.Text, k.Remedy = maint.CheckWarn, fmt.Sprintf("QEMU's certificate %s expires on %s", c.File, c.Until().Format(time.DateOnly)), "renew it"
	default:
		k.Text = fmt.Sprintf("QEMU's certificate %s, for %v, is valid until %s", c.File, c.Names(), c.Until().Format(time.DateOnly))
	}
	return k
}

// doctorPeer checks the way to one peer.
func (a *Agent) doctorPeer(ctx context.Context, p *peer, here maint.Host) []maint.Check {
	s := p.ask(ctx)
	greeting := maint.Check{Rung: "D", Name: "peer " + p.name, Result: maint.CheckOK,
		Text: fmt.Sprintf("belayd %s answers in %s", s.Version, s.Latency.Round(100*time.Microsecond))}
	switch {
	case !s.OK:
		greeting.Result, greeting.Text = maint.CheckFail, s.Error
		greeting.Remedy = "see that belayd runs there and that both hosts' certificates are of the same CA"
	case here.UUID != "" && s.HostUUID == here.UUID:
		greeting.Result, greeting.Text = maint.CheckFail, "it has the same libvirt host UUID as this host, libvirt refuses to migrate"
		greeting.Remedy = "set host_uuid in /etc/libvirt/libvirtd.conf on one of the two"
	case s.ClockOffset.Abs() > clockWarn+s.Latency/2:
		greeting.Result, greeting.Text = maint.CheckWarn, fmt.Sprintf("its clock is off by %s", s.ClockOffset.Round(time.Millisecond))
		greeting.Remedy = "run a time service (chrony) on both hosts"
	}
	return []maint.Check{greeting, a.checkPeerLibvirt(ctx, p)}
}

// defaultPort is libvirtd's for a transport, "" where a dial says nothing; see
// libvirt's documentation of remote URIs.
func defaultPort(scheme string) string {
	switch scheme {
	case "qemu+tls":
		return "16514"
	case "qemu+tcp":
		return "16509"
	case "qemu+ssh":
		return "22"
	}
	return ""
}

// checkPeerLibvirt sees whether the peer's libvirt listens where this host's libvirtd
// will look for it, and, by TLS, whether the two accept each other.
func (a *Agent) checkPeerLibvirt(ctx context.Context, p *peer) maint.Check {
	c := a.libvirtListens(ctx, p)
	if c.Result == maint.CheckFail {
		return c
	}
	if a.cfg.Migration.TLS {
		if ps := migrate.PlainWay(p.name, maint.MoveParams{DestURI: p.cfg.LibvirtURI, MigrateURI: p.cfg.MigrateURI}); len(ps) > 0 {
			c.Result, c.Text, c.Remedy = maint.CheckFail, ps[0].Reason, ps[0].Remedy
			return c
		}
	}
	theirs, problem := a.local.GreetLibvirt(ctx, a.cfg.Host, p.name, p.cfg.LibvirtURI)
	switch {
	case problem != nil:
		c.Result, c.Text, c.Remedy = maint.CheckFail, problem.Subject+": "+problem.Reason, problem.Remedy
	case theirs.Leaf != nil && time.Until(theirs.Until()) < certWarn:
		c.Result, c.Text = maint.CheckWarn, "the certificate of its libvirt expires on "+theirs.Until().Format(time.DateOnly)
		c.Remedy = "renew /etc/pki/libvirt/servercert.pem there, and restart libvirt"
	case theirs.Leaf != nil:
		c.Text = fmt.Sprintf("%s accepts this host, its certificate is valid until %s", p.cfg.LibvirtURI, theirs.Until().Format(time.DateOnly))
	}
	return c
}

func (a *Agent) libvirtListens(ctx context.Context, p *peer) maint.Check {
	c := maint.Check{Rung: "D", Name: "peer " + p.name + " libvirt", Result: maint.CheckOK}
	u, err := url.Parse(p.cfg.LibvirtURI)
	if err != nil || defaultPort(u.Scheme) == "" {
		c.Result, c.Text = maint.CheckNA, "cannot be checked for "+p.cfg.LibvirtURI
		return c
	}
	port := u.Port()
	if port == "" {
		port = defaultPort(u.Scheme)
	}
	ctx, cancel := context.WithTimeout(ctx, dialWait)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(u.Hostname(), port))
	if err != nil {
		c.Result, c.Text = maint.CheckFail, fmt.Sprintf("%s: %v", p.cfg.LibvirtURI, err)
		c.Remedy = "enable libvirt's remote socket there (systemctl enable --now libvirtd-tls.socket) and open the port"
		var unresolved *net.DNSError
		if errors.As(err, &unresolved) {
			c.Text = fmt.Sprintf("%s: the name %s does not resolve here", p.cfg.LibvirtURI, u.Hostname())
			c.Remedy = "add it to DNS or /etc/hosts, or use an address in peers." + p.name + ".libvirt_uri"
		}
		return c
	}
	conn.Close()
	c.Text = p.cfg.LibvirtURI + " accepts connections"
	return c
}
