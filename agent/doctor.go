package agent

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
)

const (
	certWarn  = 14 * 24 * time.Hour // warn this long before a certificate ends
	clockWarn = 500 * time.Millisecond
	roomWarn  = 64 << 20 // bytes free in the state folder
)

// Doctor says what is missing for each rung on this host.
func (a *Agent) Doctor(ctx context.Context) ([]maint.Check, error) {
	var checks []maint.Check
	add := func(rung, name string, r maint.CheckResult, remedy, format string, args ...any) {
		checks = append(checks, maint.Check{Rung: rung, Name: name, Result: r, Text: fmt.Sprintf(format, args...), Remedy: remedy})
	}
	host, err := a.hyp.Info(ctx)
	if err != nil {
		add("host", "libvirt", maint.CheckFail, "systemctl status libvirtd virtqemud", "%v", err)
	} else {
		add("host", "libvirt", maint.CheckOK, "", "libvirt %s, QEMU %s, host UUID %s", host.LibvirtVersion, host.QEMUVersion, host.UUID)
	}
	checks = append(checks, a.checkState(), a.checkShutdown(ctx), a.checkCert())
	checks = append(checks, a.doctorA(ctx)...)
	checks = append(checks, a.doctorB(ctx)...)
	checks = append(checks, a.doctorKexec()...)
	checks = append(checks, a.doctorC(ctx)...)
	if len(a.peers) == 0 {
		add("D", "peers", maint.CheckWarn, "add one to the configuration as [peers.NAME]", "no peer is configured, guests have nowhere to go")
		return checks, nil
	}
	return append(checks, a.doctorD(ctx, host)...), nil
}

// checkState looks at the state folder.
func (a *Agent) checkState() maint.Check {
	c := maint.Check{Rung: "host", Name: "state folder", Result: maint.CheckOK}
	var fs unix.Statfs_t
	switch err := unix.Statfs(a.cfg.StateDir, &fs); {
	case err != nil:
		c.Result, c.Text, c.Remedy = maint.CheckFail, fmt.Sprintf("%s: %v", a.cfg.StateDir, err), "make the folder, writable for belayd"
	case a.journal.Health() != nil:
		c.Result, c.Text, c.Remedy = maint.CheckFail, a.journal.Health().Error(), "make room in "+a.cfg.StateDir
	case fs.Bavail*uint64(fs.Bsize) < roomWarn:
		c.Result, c.Text, c.Remedy = maint.CheckWarn, fmt.Sprintf("%s has %d MiB left", a.cfg.StateDir, fs.Bavail*uint64(fs.Bsize)>>20), "make room; no operation can begin when it is full"
	default:
		c.Text = fmt.Sprintf("%s is writable, %d MiB left", a.cfg.StateDir, fs.Bavail*uint64(fs.Bsize)>>20)
	}
	return c
}

// checkCert looks at this host's certificate.
func (a *Agent) checkCert() maint.Check {
	c := maint.Check{Rung: "host", Name: "certificate", Result: maint.CheckNA, Text: "none is configured, and none is needed without peers"}
	if a.cfg.TLS.Cert == "" {
		return c
	}
	c.Result, c.Remedy = maint.CheckFail, "put a certificate for this host, signed by the peers' CA, into "+a.cfg.TLS.Cert
	cert, err := certificate(a.cfg.TLS.Cert)
	switch {
	case err != nil:
		c.Text = err.Error()
	case time.Now().After(cert.NotAfter):
		c.Text = fmt.Sprintf("expired on %s", cert.NotAfter.Format(time.DateOnly))
	case time.Until(cert.NotAfter) < certWarn:
		c.Result, c.Text = maint.CheckWarn, fmt.Sprintf("expires on %s", cert.NotAfter.Format(time.DateOnly))
	default:
		c.Result, c.Remedy, c.Text = maint.CheckOK, "", fmt.Sprintf("%s, valid until %s", cert.Subject.CommonName, cert.NotAfter.Format(time.DateOnly))
	}
	return c
}

// certificate reads the first certificate of a PEM file.
func certificate(file string) (*x509.Certificate, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fmt.Errorf("%s has no PEM block", file)
	}
	return x509.ParseCertificate(block.Bytes)
}
