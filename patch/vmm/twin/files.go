package twin

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"
)

// Where libvirt keeps what the twin has of its own.
const (
	etcDir     = "/etc/libvirt"
	runDir     = "/run/libvirt"
	qemuDir    = "/var/lib/libvirt/qemu"
	cacheDir   = "/var/cache/libvirt"
	dnsmasqDir = "/var/lib/libvirt/dnsmasq"
	nvramDir   = qemuDir + "/nvram"
	ramDir     = qemuDir + "/ram" // the default of memory_backing_dir
)

// privateDirs are those that the host and the twin each have of their own,
// nvram below qemuDir excepted.
func privateDirs() []string { return []string{etcDir, runDir, qemuDir, cacheDir, dnsmasqDir} }

// makeFiles fills the twin's folders from the host's, whose files are below
// host ("" but in tests). Those that are there already are written anew.
func (p place) makeFiles(host string, s settings) error {
	for _, dir := range []string{"log", "run", "etc/hooks", "etc/qemu/networks/autostart", "cache", "lib", "dnsmasq", "home", "sink",
		"link/" + atHome, "link/" + inTwin, "coming"} {
		if err := os.MkdirAll(p.at(dir), 0o711); err != nil {
			return err
		}
	}
	if err := p.makeMigrate(host); err != nil {
		return err
	}
	if err := p.copyEtc(host); err != nil {
		return err
	}
	for name, text := range map[string]string{
		"etc/libvirtd.conf": libvirtdConf(hostUUID(host, s.hostname)),
		"etc/qemu.conf":     s.twinQEMUConf(),
	} {
		if err := os.WriteFile(p.at(name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	if err := os.WriteFile(p.at("etc/hooks/qemu"), []byte(twinHook(string(p))), 0o700); err != nil {
		return err
	}
	if err := p.copyNetworks(host); err != nil {
		return err
	}
	// What libvirtd has learnt about QEMU: it would take seconds to learn anew.
	return copyTree(host+cacheDir+"/qemu/capabilities", p.at("cache/qemu/capabilities"))
}

// makeMigrate makes the folder of QEMU's sockets, for the user that QEMU runs as:
// libvirtd gives that user its own folder.
func (p place) makeMigrate(host string) error {
	dir := p.at("migrate")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	var owner unix.Stat_t
	if err := unix.Stat(host+qemuDir, &owner); err != nil {
		return fmt.Errorf("cannot see who owns %s: %w", qemuDir, err)
	}
	return os.Chown(dir, int(owner.Uid), int(owner.Gid))
}

// copyEtc copies settings and secrets. Not copied are definitions of guests and
// pools, which are home's to start, and the hooks: what they did for a guest that
// starts here they would undo when it leaves.
func (p place) copyEtc(host string) error {
	confs, err := filepath.Glob(host + etcDir + "/*.conf")
	if err != nil {
		return err
	}
	for _, from := range confs {
		if err := copyFile(from, p.at("etc", filepath.Base(from))); err != nil {
			return err
		}
	}
	return copyTree(host+etcDir+"/secrets", p.at("etc/secrets"))
}

// copyTree copies regular files and folders; that there are none is no error.
func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		switch {
		case d.IsDir():
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		case d.Type().IsRegular():
			return copyFile(path, filepath.Join(to, rel))
		}
		return nil
	})
}

func copyFile(from, to string) error {
	in, err := os.Open(from)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// libvirtdConf: only root can reach the twin, by its unix socket.
func libvirtdConf(uuid string) string {
	return fmt.Sprintf(`host_uuid = %q
listen_tls = 0
listen_tcp = 0
unix_sock_dir = "/run/libvirt"
unix_sock_rw_perms = "0700"
unix_sock_ro_perms = "0700"
auth_unix_ro = "none"
auth_unix_rw = "none"
log_outputs = "3:stderr"
`, uuid)
}

// hostUUID is the twin's: always the same on one host, and not the host's.
func hostUUID(host, hostname string) string {
	machine, _ := os.ReadFile(host + "/etc/machine-id") // without one the name has to do
	sum := sha256.Sum256(append([]byte("belay twin "+hostname+" "), machine...))
	b := sum[:16]
	b[6], b[8] = b[6]&0x0f|0x80, b[8]&0x3f|0x80 // version 8: made as we like
	h := hex.EncodeToString(b)
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

// twinName is the twin's host name. A dot keeps libvirt from asking a name server
// what its full name is.
func twinName(hostname string) string {
	const domain, longest = ".belay-twin", 64 // HOST_NAME_MAX
	return hostname[:min(len(hostname), longest-len(domain))] + domain
}

// settings are those of the host's libvirt that matter here.
type settings struct {
	hostname string
	qemuConf string // the text of its qemu.conf
}

func readSettings(host string) (s settings, err error) {
	if s.hostname, err = os.Hostname(); err != nil {
		return s, err
	}
	text, err := os.ReadFile(host + etcDir + "/qemu.conf")
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // without one all is as by default
		return s, err
	}
	s.qemuConf = string(text)
	return s, nil
}

// text gives a setting of qemu.conf that is text, "" when it is not set. Where
// libvirt finds one twice, the first counts.
func (s settings) text(key string) string {
	m := regexp.MustCompile(`(?m)^[ \t]*` + key + `[ \t]*=[ \t]*["']([^"'\n]*)["']`).FindStringSubmatch(s.qemuConf)
	if m == nil {
		return ""
	}
	return m[1]
}

// emptyList reports whether a setting of qemu.conf is a list without elements.
func (s settings) emptyList(key string) bool {
	return regexp.MustCompile(`(?m)^[ \t]*` + key + `[ \t]*=[ \t]*\[\s*\]`).MatchString(s.qemuConf)
}

// memory is the folder with the host's guests' memory files.
func (s settings) memory() string { return cmp.Or(s.text("memory_backing_dir"), ramDir) }

// homeRAMs is the folder in which libvirt makes one for each of the host's guests
// with memory files.
func (s settings) homeRAMs() string {
	if m := s.text("memory_backing_dir"); m != "" {
		return filepath.Join(m, "libvirt/qemu")
	}
	return ramDir
}

// twinMemory is the same for the twin: on the same file system, so that a file
// can be linked from one to the other, but apart, since libvirt names a guest's
// folder by a number that both daemons count from 1.
func (s settings) twinMemory() string { return filepath.Join(s.memory(), "belay-twin") }

// twinQEMUConf is the host's qemu.conf with what is different in the twin. There
// are no cgroups in it: systemd-machined would take its guest for the one at
// home.
func (s settings) twinQEMUConf() string {
	return fmt.Sprintf("memory_backing_dir = %q\ncgroup_controllers = [ ]\n", s.twinMemory()) + s.qemuConf
}

// networkXML is the part of a <network> that Belay reads.
type networkXML struct {
	XMLName xml.Name `xml:"network"`
	Name    string   `xml:"name"`
	UUID    string   `xml:"uuid"`
	Forward *struct {
		Mode string `xml:"mode,attr"`
	} `xml:"forward"`
	Bridge struct {
		Name string `xml:"name,attr"`
	} `xml:"bridge"`
	Ports []struct {
		Attrs []xml.Attr `xml:",any,attr"`
		Inner string     `xml:",innerxml"`
	} `xml:"portgroup"`
	VirtualPort *struct{} `xml:"virtualport"`
}

// bridged gives the definition that a network has in the twin: one that only
// names the bridge, which is there already. ok is false for a network that is not
// made of a Linux bridge.
func bridged(text []byte) (name, definition string, ok bool, err error) {
	var n networkXML
	if err := xml.Unmarshal(text, &n); err != nil {
		return "", "", false, fmt.Errorf("cannot read a network's definition: %w", err)
	}
	if n.Forward != nil {
		switch n.Forward.Mode {
		case "", "nat", "route", "open", "bridge":
		default: // hostdev, macvtap
			return n.Name, "", false, nil
		}
	}
	if n.Bridge.Name == "" || n.VirtualPort != nil || filepath.Base(n.Name) != n.Name {
		return n.Name, "", false, nil
	}
	var b strings.Builder
	enc := xml.NewEncoder(&b)
	type attr struct {
		Name string `xml:"name,attr,omitempty"`
		Mode string `xml:"mode,attr,omitempty"`
	}
	type portgroup struct {
		Attrs []xml.Attr `xml:",any,attr"`
		Inner string     `xml:",innerxml"`
	}
	def := struct {
		XMLName xml.Name    `xml:"network"`
		Name    string      `xml:"name"`
		UUID    string      `xml:"uuid,omitempty"`
		Forward attr        `xml:"forward"`
		Bridge  attr        `xml:"bridge"`
		Ports   []portgroup `xml:"portgroup"`
	}{Name: n.Name, UUID: n.UUID, Forward: attr{Mode: "bridge"}, Bridge: attr{Name: n.Bridge.Name}}
	for _, g := range n.Ports {
		def.Ports = append(def.Ports, portgroup(g))
	}
	if err := enc.Encode(def); err != nil {
		return n.Name, "", false, err
	}
	return n.Name, b.String(), true, nil
}

// networks gives the definitions that the host's networks have in the twin, by
// name.
func networks(host string) (map[string]string, error) {
	files, err := filepath.Glob(host + etcDir + "/qemu/networks/*.xml")
	if err != nil {
		return nil, err
	}
	defs := make(map[string]string)
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		name, def, ok, err := bridged(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f, err)
		}
		if ok {
			defs[name] = def
		}
	}
	return defs, nil
}

func (p place) copyNetworks(host string) error {
	defs, err := networks(host)
	if err != nil {
		return err
	}
	for name, def := range defs {
		file := p.at("etc/qemu/networks", name+".xml")
		if err := os.WriteFile(file, []byte(def), 0o600); err != nil {
			return err
		}
		auto := p.at("etc/qemu/networks/autostart", name+".xml")
		if err := os.Symlink(etcDir+"/qemu/networks/"+name+".xml", auto); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}
