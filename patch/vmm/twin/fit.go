package twin

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"belay/agent/maint"
)

// domainXML is the part of a <domain> that Belay reads.
type domainXML struct {
	Backing struct {
		Hugepages *struct{} `xml:"hugepages"`
	} `xml:"memoryBacking"`
	CPUTune struct {
		All []struct{ XMLName xml.Name } `xml:",any"`
	} `xml:"cputune"`
	SecLabels []struct {
		Type  string `xml:"type,attr"`
		Model string `xml:"model,attr"`
	} `xml:"seclabel"`
	Devices struct {
		All []deviceXML `xml:",any"`
	} `xml:"devices"`
	Options struct {
		Args []struct {
			Value string `xml:"value,attr"`
		} `xml:"arg"`
		Env []struct {
			Name string `xml:"name,attr"`
		} `xml:"env"`
	} `xml:"http://libvirt.org/schemas/domain/qemu/1.0 commandline"`
}

// deviceXML is any child of <devices>; which fields are set depends on its kind.
type deviceXML struct {
	XMLName   xml.Name
	Type      string `xml:"type,attr"`
	Model     string `xml:"model,attr"`
	Device    string `xml:"device,attr"`
	Port      string `xml:"port,attr"`
	TLSPort   string `xml:"tlsPort,attr"`
	AutoPort  string `xml:"autoport,attr"`
	Websocket string `xml:"websocket,attr"`
	Source    struct {
		Path    string `xml:"path,attr"`
		Dev     string `xml:"dev,attr"`
		Network string `xml:"network,attr"`
	} `xml:"source"`
	Target struct {
		Dev string `xml:"dev,attr"`
	} `xml:"target"`
	Listen []struct {
		Type string `xml:"type,attr"`
	} `xml:"listen"`
	Backend struct {
		Model string `xml:"model,attr"`
	} `xml:"backend"`
	ReadOnly    *struct{} `xml:"readonly"`
	Shared      *struct{} `xml:"shareable"`
	FilterRef   *struct{} `xml:"filterref"`
	VirtualPort *struct{} `xml:"virtualport"`
}

func (d *deviceXML) kind() string { return d.XMLName.Local }

// fit tells why there cannot be two of a guest on one host for a while, from the
// XML that a migration would send. nets are the networks that the twin has. All
// devices that are not known to be good are refused.
func fit(guest, portable string, nets map[string]string) ([]maint.Problem, error) {
	var d domainXML
	if err := xml.Unmarshal([]byte(portable), &d); err != nil {
		return nil, fmt.Errorf("cannot read the XML of guest %s: %w", guest, err)
	}
	var problems []maint.Problem
	add := func(format string, args ...any) {
		p := *maint.Problemf(maint.CodeSourceRefuses, "guest "+guest, "move it to another host instead (belay migrate)", format, args...)
		if !slices.Contains(problems, p) {
			problems = append(problems, p)
		}
	}
	if d.Backing.Hugepages != nil {
		add("has its memory in huge pages, of which there are hardly enough for two of it")
	}
	for _, e := range d.CPUTune.All {
		switch name := e.XMLName.Local; {
		case strings.HasSuffix(name, "quota"), strings.HasSuffix(name, "period"), name == "cachetune", name == "memorytune":
			add("has its CPU time or cache limited by <%s>, which the twin, having no cgroups, cannot do", name)
		}
	}
	for _, l := range d.SecLabels {
		if l.Model != "" && l.Model != "dac" && l.Type != "none" {
			add("is confined by %s under a profile that goes when the first of its two QEMUs does", l.Model)
		}
	}
	if !ownOptions(&d) {
		add("has options of QEMU in its definition (qemu:commandline), and nobody knows what they do twice on one host")
	}
	for i := range d.Devices.All {
		if why := d.Devices.All[i].alone(nets); why != "" {
			add("%s", why)
		}
	}
	paths, err := privatePaths(portable)
	if err != nil {
		return nil, err
	}
	for _, path := range paths {
		add("uses %s, which is not the same in the twin", path)
	}
	return problems, nil
}

// ownOptions reports whether all that a guest has of QEMU's options is what an
// earlier change of QEMU has left in it.
func ownOptions(d *domainXML) bool {
	for i, a := range d.Options.Args {
		if want := []string{"-incoming", "defer"}; a.Value != want[i%2] {
			return false
		}
	}
	for _, e := range d.Options.Env {
		if !strings.HasPrefix(e.Name, "BELAY_") {
			return false
		}
	}
	return true
}

// alone tells why there can be only one of a device on a host, "" if there can
// be two.
func (d *deviceXML) alone(nets map[string]string) string {
	switch d.kind() {
	case "interface":
		return d.aloneInterface(nets)
	case "graphics":
		return d.aloneGraphics()
	case "disk":
		if slices.Contains([]string{"file", "block", "network", "dir"}, d.Type) {
			return ""
		}
		return fmt.Sprintf("has a disk of type %s, which cannot be opened twice or is not known in the twin", d.Type)
	case "serial", "parallel", "console", "channel":
		if slices.Contains([]string{"pty", "file", "null", "vc", "spicevmc", "spiceport", "qemu-vdagent", "dbus"}, d.Type) ||
			d.Type == "unix" && d.Source.Path == "" {
			return ""
		}
		return fmt.Sprintf("has a %s of type %s at a place that there is only once", d.kind(), d.Type)
	case "input":
		if d.Type == "passthrough" || d.Type == "evdev" {
			return "has an input device of the host's"
		}
		return ""
	case "rng":
		if d.Backend.Model == "egd" {
			return "has a random number generator that is fed through a socket"
		}
		return ""
	case "redirdev", "smartcard":
		if d.Type == "spicevmc" {
			return ""
		}
	case "memory":
		if d.Model == "dimm" || d.Model == "virtio-mem" {
			return ""
		}
	case "emulator", "controller", "video", "sound", "audio", "watchdog", "memballoon", "panic", "hub", "iommu", "crypto":
		return ""
	case "tpm":
		return "has a TPM, whose state there is only once"
	case "vsock":
		return "has a vsock device, whose address (CID) there is only once on a host"
	}
	return fmt.Sprintf("has a <%s> device, of which there can be only one on a host", d.kind())
}

func (d *deviceXML) aloneInterface(nets map[string]string) string {
	switch {
	case d.Target.Dev != "": // libvirt's own choice is not in this XML
		return fmt.Sprintf("has an interface that must be called %s", d.Target.Dev)
	case d.FilterRef != nil:
		return "has an interface with a network filter, which the twin does not have"
	case d.VirtualPort != nil:
		return "has an interface with a virtual port, which a switch knows once"
	case d.Type == "bridge", d.Type == "user":
		return ""
	case d.Type == "network":
		if nets[d.Source.Network] != "" {
			return ""
		}
		return fmt.Sprintf("has an interface in network %s, which is not made of a bridge", d.Source.Network)
	}
	return fmt.Sprintf("has an interface of type %s, of which there can be only one", d.Type)
}

func (d *deviceXML) aloneGraphics() string {
	for _, l := range d.Listen {
		if l.Type == "none" {
			return ""
		}
	}
	fixed := func(port string) bool { return port != "" && port != "-1" && port != "0" }
	switch {
	case d.Type == "egl-headless", d.Type == "dbus":
		return ""
	case d.Type != "vnc" && d.Type != "spice":
		return fmt.Sprintf("has graphics of type %s, of which there can be only one", d.Type)
	case fixed(d.Websocket):
		return "has graphics on a web socket of a fixed port"
	case d.AutoPort != "yes" && (fixed(d.Port) || fixed(d.TLSPort)):
		return fmt.Sprintf("has graphics (%s) on a fixed port", d.Type)
	}
	return ""
}

// privatePaths are the paths in an XML text that mean something else in the twin.
func privatePaths(text string) (paths []string, err error) {
	look := func(word string) {
		word = strings.TrimSpace(word)
		if p, ok := strings.CutPrefix(word, "/var/run/"); ok {
			word = "/run/" + p
		}
		for _, dir := range privateDirs() {
			if strings.HasPrefix(word, dir+"/") && !strings.HasPrefix(word, nvramDir+"/") {
				paths = append(paths, word)
			}
		}
	}
	for dec := xml.NewDecoder(strings.NewReader(text)); ; {
		tok, err := dec.Token()
		if errors.Is(err, io.EOF) {
			return paths, nil
		}
		if err != nil {
			return nil, fmt.Errorf("cannot read domain XML: %w", err)
		}
		switch tok := tok.(type) {
		case xml.StartElement:
			for _, a := range tok.Attr {
				look(a.Value)
			}
		case xml.CharData:
			look(string(tok))
		}
	}
}
