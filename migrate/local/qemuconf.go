package local

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"belay/migrate"
)

// QEMU's settings for migrations, where libvirt keeps them and what they are by default.
const (
	qemuConf   = "/etc/libvirt/qemu.conf"
	firstPort  = 49152
	lastPort   = 49215
	migratePKI = "/etc/pki/libvirt-migrate"
	qemuPKI    = "/etc/pki/qemu"
)

// Wiring is what this host has for the memory of guests that come and go.
//
// Sources: libvirt's qemu.conf (migration_port_min, migration_port_max), /proc/net/tcp,
// the network's links, and the certificates of QEMU.
func (h *Host) Wiring() migrate.Wiring {
	conf := h.qemuConf()
	w := migrate.Wiring{Addresses: h.own(), Listening: h.listening(), First: firstPort, Last: lastPort}
	if p, err := strconv.ParseUint(conf["migration_port_min"], 10, 16); err == nil {
		w.First = uint16(p)
	}
	if p, err := strconv.ParseUint(conf["migration_port_max"], 10, 16); err == nil {
		w.Last = uint16(p)
	}
	w.Server = h.qemuCertificate(conf, "server")
	return w
}

// Client is the certificate of this host's QEMU for guests that leave. One that is not
// there is no fault: not every destination asks for it.
func (h *Host) Client() migrate.Certificate {
	c := h.qemuCertificate(h.qemuConf(), "client")
	if !h.there(c.File) {
		c.Fault, c.Remedy = "", ""
	}
	return c
}

// ForcesTLS reports whether libvirt itself refuses migrations without TLS.
//
// Source: qemu.conf, migrate_tls_force.
func (h *Host) ForcesTLS() bool { return h.qemuConf()["migrate_tls_force"] == "1" }

// Trusts are the CAs that this host's QEMU trusts, by their fingerprints; none where that
// cannot be read.
func (h *Host) Trusts() (all []string) {
	text, err := os.ReadFile(h.at(filepath.Join(h.pkiDir(h.qemuConf()), "ca-cert.pem")))
	if err != nil {
		return nil
	}
	for _, c := range parse(text) {
		all = append(all, fingerprint(c))
	}
	return all
}

// pkiDir is where libvirt has QEMU find certificates for migrations.
func (h *Host) pkiDir(conf map[string]string) string {
	dir := conf["migrate_tls_x509_cert_dir"]
	if dir == "" {
		if dir = migratePKI; !h.there(dir) {
			if dir = conf["default_tls_x509_cert_dir"]; dir == "" {
				dir = qemuPKI
			}
		}
	}
	return dir
}

// qemuCertificate is one of those that libvirt has QEMU use for migrations.
func (h *Host) qemuCertificate(conf map[string]string, role string) migrate.Certificate {
	dir := h.pkiDir(conf)
	c := h.certificate(filepath.Join(dir, role+"-cert.pem"), filepath.Join(dir, role+"-key.pem"), filepath.Join(dir, "ca-cert.pem"))
	if c.Remedy != "" {
		c.Remedy += "; the folder is migrate_tls_x509_cert_dir, or default_tls_x509_cert_dir, in its " + qemuConf
	}
	return c
}

// qemuConf reads libvirt's settings for QEMU: numbers, and texts without their quotes.
func (h *Host) qemuConf() map[string]string {
	conf := make(map[string]string)
	h.lines(qemuConf, func(line string) {
		key, value, found := strings.Cut(line, "=")
		key, value = strings.TrimSpace(key), strings.TrimSpace(value)
		if !found || strings.HasPrefix(key, "#") {
			return
		}
		if q := strings.TrimPrefix(value, `"`); q != value {
			value, _, _ = strings.Cut(q, `"`)
		} else {
			value, _, _ = strings.Cut(value, "#")
		}
		conf[key] = strings.TrimSpace(value)
	})
	return conf
}
