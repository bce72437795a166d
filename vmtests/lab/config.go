package lab

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

const (
	// MemoryDir is where libvirt keeps guests' memory that is in files: a
	// tmpfs of the host's own, which [Host.Path] sees through the host's
	// holder.
	MemoryDir = "/var/lib/libvirt/qemu/ram"
	// HooksDir is where libvirtd looks for its hooks.
	HooksDir = "/etc/libvirt/hooks"
)

// writeFiles fills the host's private folders.
func (h *Host) writeFiles(ctx context.Context) error {
	for _, dir := range append(privateDirs(), "/etc/libvirt/qemu", "/var/lib/libvirt/images",
		"/var/log/libvirt/qemu") { // virtlogd makes no folder for a guest that arrives
		if err := os.MkdirAll(filepath.Join(h.Dir, dir), 0o755); err != nil {
			return err
		}
	}
	if err := h.copyEtc(ctx); err != nil {
		return err
	}
	files := map[string]string{
		"/etc/hostname":                h.Name + "\n",
		"/etc/hosts":                   h.lab.etcHosts(),
		"/etc/resolv.conf":             "# There is no name server in the lab.\n",
		"/etc/libvirt/libvirt.conf":    "",
		"/etc/libvirt/libvirtd.conf":   h.libvirtdConf(),
		"/etc/libvirt/qemu.conf":       h.qemuConf(),
		"/etc/libvirt/virtlogd.conf":   daemonConf(Virtlogd),
		"/etc/libvirt/virtlockd.conf":  daemonConf(Virtlockd),
		"/etc/libvirt/qemu-lockd.conf": "auto_disk_leases = 1\n",
	}
	for inside, text := range files {
		if err := os.WriteFile(h.Path(inside), []byte(text), 0o644); err != nil {
			return err
		}
	}
	if err := h.loadCapabilities(); err != nil {
		return err
	}
	if err := h.installHooks(ctx); err != nil {
		return err
	}
	return h.installPKI()
}

// installHooks gives libvirtd its hooks, before it starts: a daemon that finds
// none then looks for none later.
func (h *Host) installHooks(ctx context.Context) error {
	if h.lab.hooks == "" {
		return nil
	}
	return h.lab.run(tool(ctx, "cp", "--recursive", "--preserve=mode", "--no-target-directory", "--", h.lab.hooks, h.Path(HooksDir)))
}

// copyEtc copies the machine's /etc, so that programs find their users, their
// loader's cache and their settings, and a host's changes stay its own. Left
// out is what the lab writes itself: a link among those would lead the write out
// of the host.
func (h *Host) copyEtc(ctx context.Context) error {
	entries, err := os.ReadDir("/etc")
	if err != nil {
		return err
	}
	own := map[string]bool{"hostname": true, "hosts": true, "libvirt": true, "pki": true, "resolv.conf": true}
	args := []string{"--archive", "--target-directory", filepath.Join(h.Dir, "etc"), "--"}
	for _, e := range entries {
		if !own[e.Name()] {
			args = append(args, filepath.Join("/etc", e.Name()))
		}
	}
	return h.lab.run(tool(ctx, "cp", args...))
}

func (l *Lab) etcHosts() string {
	var b strings.Builder
	b.WriteString("127.0.0.1 localhost\n")
	for _, h := range l.Hosts {
		fmt.Fprintf(&b, "%s %s\n", h.Addr, h.Name)
	}
	return b.String()
}

// setting is one line of a libvirt configuration file.
type setting struct {
	key   string
	value any // string, int, or []string
}

func render(settings []setting) string {
	var b bytes.Buffer
	for _, s := range settings {
		switch v := s.value.(type) {
		case int:
			fmt.Fprintf(&b, "%s = %d\n", s.key, v)
		case string:
			fmt.Fprintf(&b, "%s = %q\n", s.key, v)
		case []string:
			quoted := make([]string, len(v))
			for i, e := range v {
				quoted[i] = fmt.Sprintf("%q", e)
			}
			fmt.Fprintf(&b, "%s = [ %s ]\n", s.key, strings.Join(quoted, ", "))
		}
	}
	return b.String()
}

// logTo sends a daemon's warnings (level 3) and errors to a file.
func logTo(d Daemon) setting {
	return setting{"log_outputs", "3:file:/var/log/libvirt/" + string(d) + ".log"}
}

func daemonConf(d Daemon) string { return render([]setting{logTo(d)}) }

// libvirtdConf: root alone can reach the socket, and needs no polkit, which
// would need D-Bus. Over TCP everyone is let in: only the lab can connect. Over
// TLS it is whoever has a host's certificate; an operator's or a viewer's, of
// the same CA, is no way in.
func (h *Host) libvirtdConf() string {
	settings := []setting{
		{"host_uuid", h.UUID},
		{"listen_addr", "0.0.0.0"},
		{"unix_sock_rw_perms", "0700"},
		{"unix_sock_ro_perms", "0700"},
		{"auth_unix_ro", "none"},
		{"auth_unix_rw", "none"},
		logTo(Libvirtd),
	}
	if h.lab.TLS {
		settings = append(settings,
			setting{"listen_tls", 1},
			setting{"listen_tcp", 0},
			setting{"auth_tls", "none"},
			setting{"tls_allowed_dn_list", []string{"CN=host-*"}})
	} else {
		settings = append(settings,
			setting{"listen_tls", 0},
			setting{"listen_tcp", 1},
			setting{"auth_tcp", "none"})
	}
	return render(settings)
}

// qemuConf: a host has no cgroups, no security module and no device nodes of
// its own, so everything that libvirt would do with them is off. Disks are
// leased through virtlockd.
func (h *Host) qemuConf() string {
	settings := []setting{
		{"user", "root"},
		{"group", "root"},
		{"security_driver", "none"},
		{"cgroup_controllers", []string{}},
		{"namespaces", []string{}},
		{"remember_owner", 0},
		{"memory_backing_dir", MemoryDir},
		{"lock_manager", "lockd"},
		{"migration_address", h.Addr.String()},
		{"migration_host", h.Addr.String()},
	}
	if h.lab.TLS {
		settings = append(settings,
			setting{"migrate_tls_x509_cert_dir", "/etc/pki/qemu"},
			setting{"migrate_tls_x509_verify", 1})
	}
	return render(settings)
}
