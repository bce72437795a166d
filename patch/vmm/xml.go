package vmm

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

// token is the environment variable by which a QEMU that a replacement started
// is told from any other, in the domain's XML and by the hook.
const tokenVar = "BELAY_REPLACE"

const qemuSpace = "http://libvirt.org/schemas/domain/qemu/1.0"

// domainXML is what a survey reads of a domain's live XML.
type domainXML struct {
	PowerOff string `xml:"on_poweroff"`
	Sealed   *struct {
		Type string `xml:"type,attr"`
	} `xml:"launchSecurity"`
	Emulator string `xml:"devices>emulator"`
	Disks    []struct {
		Type      string    `xml:"type,attr"`
		Transient *struct{} `xml:"transient"`
		Target    struct {
			Dev string `xml:"dev,attr"`
		} `xml:"target"`
	} `xml:"devices>disk"`
	VSocks []struct {
		CID struct {
			Auto string `xml:"auto,attr"`
		} `xml:"cid"`
	} `xml:"devices>vsock"`
	Filesystems []struct {
		Driver struct {
			Type string `xml:"type,attr"`
		} `xml:"driver"`
	} `xml:"devices>filesystem"`
	Args []struct {
		Value string `xml:"value,attr"`
	} `xml:"http://libvirt.org/schemas/domain/qemu/1.0 commandline>arg"`
	Env []struct {
		Name  string `xml:"name,attr"`
		Value string `xml:"value,attr"`
	} `xml:"http://libvirt.org/schemas/domain/qemu/1.0 commandline>env"`
}

func parseDomain(text string) (d domainXML, err error) {
	if err := xml.Unmarshal([]byte(text), &d); err != nil {
		return d, fmt.Errorf("cannot read domain XML: %w", err)
	}
	return d, nil
}

// token is the one of the replacement that started this domain, "" if none did.
func (d domainXML) token() string {
	for _, e := range d.Env {
		if e.Name == tokenVar {
			return e.Value
		}
	}
	return ""
}

// incoming gives XML by which libvirt starts a QEMU that waits for its guest's
// state ("-incoming defer") and that carries a token. What an earlier
// replacement has put there is replaced. The rest of the text is passed on as
// it is.
func incoming(text, token string) (string, error) {
	d, err := parseDomain(text)
	if err != nil {
		return "", err
	}
	var ours strings.Builder
	args := d.Args
	if d.token() != "" { // "-incoming defer" is an earlier replacement's
		for i := range args[:max(0, len(args)-1)] {
			if args[i].Value == "-incoming" && args[i+1].Value == "defer" {
				args = append(args[:i:i], args[i+2:]...)
				break
			}
		}
	}
	element := func(kind string, attrs ...string) {
		ours.WriteString("    <qemu:" + kind)
		for i := 0; i < len(attrs); i += 2 {
			ours.WriteString(" " + attrs[i] + "='")
			_ = xml.EscapeText(&ours, []byte(attrs[i+1])) // a Builder does not fail
			ours.WriteString("'")
		}
		ours.WriteString("/>\n")
	}
	for _, a := range args {
		element("arg", "value", a.Value)
	}
	element("arg", "value", "-incoming")
	element("arg", "value", "defer")
	for _, e := range d.Env {
		if e.Name != tokenVar {
			element("env", "name", e.Name, "value", e.Value)
		}
	}
	element("env", "name", tokenVar, "value", token)

	head, rest, tail, err := cut(text)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s xmlns:qemu='%s'>%s  <qemu:commandline>\n%s  </qemu:commandline>\n%s",
		head, qemuSpace, rest, ours.String(), tail), nil
}

// cut takes a domain's text apart: the start tag without its namespace of QEMU's
// and its ">", what is between, without <qemu:commandline>, and the end tag.
func cut(text string) (head, rest, tail string, err error) {
	dec := xml.NewDecoder(strings.NewReader(text))
	depth, bodyFrom, from := 0, int64(-1), int64(-1)
	var gone [2]int64
	for {
		before := dec.InputOffset()
		tok, err := dec.Token()
		if err == io.EOF {
			return "", "", "", fmt.Errorf("cannot read domain XML: no <domain> in it")
		}
		if err != nil {
			return "", "", "", fmt.Errorf("cannot read domain XML: %w", err)
		}
		switch tok := tok.(type) {
		case xml.StartElement:
			depth++
			switch {
			case depth == 1:
				bodyFrom = dec.InputOffset()
				head = text[before : bodyFrom-1]
				if tok.Name.Local != "domain" || strings.HasSuffix(head, "/") {
					return "", "", "", errors.New("cannot read domain XML: it is no <domain>, or an empty one")
				}
			case depth == 2 && tok.Name.Space == qemuSpace && tok.Name.Local == "commandline":
				from = before
			}
		case xml.EndElement:
			depth--
			switch {
			case depth == 1 && from >= 0:
				gone, from = [2]int64{from, dec.InputOffset()}, -1
			case depth == 0:
				rest = text[bodyFrom:before]
				if gone[1] > 0 {
					rest = text[bodyFrom:gone[0]] + text[gone[1]:before]
				}
				for _, quote := range []string{"'", `"`} {
					head = strings.ReplaceAll(head, " xmlns:qemu="+quote+qemuSpace+quote, "")
				}
				return head, rest, text[before:dec.InputOffset()], nil
			}
		}
	}
}

// sameDevices reports whether two domains have the same devices and vCPUs. Whether somebody in the guest
// has opened a channel is no matter.
func sameDevices(a, b string) (bool, error) {
	one, err := devices(a)
	if err != nil {
		return false, err
	}
	other, err := devices(b)
	return one == other, err
}

// devices is what a domain's XML has of devices and vCPUs, in one spelling.
func devices(text string) (string, error) {
	var all strings.Builder
	var path []string
	for dec := xml.NewDecoder(strings.NewReader(text)); ; {
		tok, err := dec.Token()
		if err == io.EOF {
			return all.String(), nil
		}
		if err != nil {
			return "", fmt.Errorf("cannot read domain XML: %w", err)
		}
		if start, ok := tok.(xml.StartElement); ok {
			path = append(path, start.Name.Local)
		}
		if len(path) > 1 && slices.Contains([]string{"devices", "vcpu", "vcpus"}, path[1]) {
			switch tok := tok.(type) {
			case xml.StartElement:
				fmt.Fprintf(&all, "<%s", tok.Name.Local)
				for _, a := range tok.Attr {
					if tok.Name.Local != "target" || a.Name.Local != "state" {
						fmt.Fprintf(&all, " %s=%q", a.Name.Local, a.Value)
					}
				}
				all.WriteString(">")
			case xml.EndElement:
				all.WriteString("</>")
			case xml.CharData:
				all.WriteString(strings.TrimSpace(string(tok)))
			}
		}
		if _, ok := tok.(xml.EndElement); ok {
			path = path[:len(path)-1]
		}
	}
}
