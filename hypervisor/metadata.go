package hypervisor

import (
	"context"
	"encoding/xml"
	"fmt"
	"strings"

	"github.com/digitalocean/go-libvirt"
)

const (
	// noteURI and policyURI name the elements that are Belay's in a domain's <metadata>, and
	// noteKey and policyKey are their prefixes there.
	noteURI   = "urn:belay:events:1"
	noteKey   = "belay"
	policyURI = "urn:belay:policy:1"
	policyKey = "belay-policy"
)

// errNoMetadata is VIR_ERR_NO_DOMAIN_METADATA.
const errNoMetadata = libvirt.ErrNoDomainMetadata

// note is an element of Belay's; its name is events or policy.
type note struct {
	XMLName xml.Name
	Text    string `xml:",chardata"`
}

// SetNote keeps a text with a guest: it goes with it wherever it is migrated, and
// stays in its definition if it has one. "" removes it. libvirt makes it wait for a
// job of the guest's, such as a migration.
//
// Source: virDomainSetMetadata with VIR_DOMAIN_METADATA_ELEMENT.
func (h *Host) SetNote(ctx context.Context, uuid, text string) error {
	return h.setElement(ctx, uuid, "events", noteKey, noteURI, text)
}

// SetPolicy keeps the text of a policy with a guest, as SetNote does a note: maint.Guest has
// it. "" removes it.
//
// Source: virDomainSetMetadata with VIR_DOMAIN_METADATA_ELEMENT.
func (h *Host) SetPolicy(ctx context.Context, uuid, text string) error {
	return h.setElement(ctx, uuid, "policy", policyKey, policyURI, text)
}

func (h *Host) setElement(ctx context.Context, uuid, name, key, uri, text string) error {
	var element libvirt.OptString // none removes it
	if text != "" {
		b, err := xml.Marshal(note{XMLName: xml.Name{Local: name}, Text: text})
		if err != nil {
			return fmt.Errorf("cannot write <%s> of guest %s: %w", name, uuid, err)
		}
		element = libvirt.OptString{string(b)}
	}
	return h.onDomain(ctx, uuid, func(s *session, d libvirt.Domain) error {
		flags, err := s.places(d)
		if err != nil {
			return err
		}
		_, err = call(s, "DomainSetMetadata", func(l *libvirt.Libvirt) (struct{}, error) {
			return struct{}{}, l.DomainSetMetadata(d, int32(libvirt.DomainMetadataElement), element,
				libvirt.OptString{key}, libvirt.OptString{uri}, flags)
		})
		if text == "" && isCode(err, errNoMetadata) {
			return nil
		}
		return err
	})
}

// places are where a domain has metadata: while it runs, in its definition.
func (s *session) places(d libvirt.Domain) (flags libvirt.DomainModificationImpact, err error) {
	active, err := call(s, "DomainIsActive", func(l *libvirt.Libvirt) (int32, error) { return l.DomainIsActive(d) })
	if err != nil {
		return 0, err
	}
	persistent, err := call(s, "DomainIsPersistent", func(l *libvirt.Libvirt) (int32, error) { return l.DomainIsPersistent(d) })
	if err != nil {
		return 0, err
	}
	if active != 0 {
		flags |= libvirt.DomainAffectLive
	}
	if persistent != 0 {
		flags |= libvirt.DomainAffectConfig
	}
	return flags, nil
}

// Note gives the text that is kept with a guest, "" for none: the running one's
// where it runs.
//
// Source: virDomainGetMetadata.
func (h *Host) Note(ctx context.Context, uuid string) (text string, err error) {
	err = h.onDomain(ctx, uuid, func(s *session, d libvirt.Domain) error {
		element, err := call(s, "DomainGetMetadata", func(l *libvirt.Libvirt) (string, error) {
			return l.DomainGetMetadata(d, int32(libvirt.DomainMetadataElement), libvirt.OptString{noteURI}, libvirt.DomainAffectCurrent)
		})
		if isCode(err, errNoMetadata) {
			return nil
		}
		if err != nil {
			return err
		}
		var n note
		if err := xml.NewDecoder(strings.NewReader(element)).Decode(&n); err != nil {
			return fmt.Errorf("cannot read the note of guest %s: %w", uuid, err)
		}
		text = n.Text
		return nil
	})
	return text, err
}
