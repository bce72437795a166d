package hypervisor

import (
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/digitalocean/go-libvirt"

	"belay/agent/maint"
)

// Guests lists all domains, sorted by name. A domain that goes away while it
// is being looked at is left out.
//
// A guest whose QEMU libvirt has not reached yet since its own start has the Job
// "catching up", and a State that may be out of date.
//
// Sources: virConnectListAllDomains, and for each domain virDomainGetJobStats,
// virDomainGetState and virDomainGetXMLDesc; on each connection, the first time,
// virDomainGetControlInfo before them.
func (h *Host) Guests(ctx context.Context) ([]maint.Guest, error) {
	var guests []maint.Guest
	err := h.do(ctx, func(s *session) error {
		all, err := s.list(0)
		if err != nil {
			return err
		}
		persistent, err := s.listSet(libvirt.ConnectListDomainsPersistent)
		if err != nil {
			return err
		}
		autostart, err := s.listSet(libvirt.ConnectListDomainsAutostart)
		if err != nil {
			return err
		}
		guests = make([]maint.Guest, 0, len(all))
		for _, d := range all {
			g, err := s.guest(d)
			if errors.Is(err, maint.ErrNoGuest) {
				continue
			}
			if err != nil {
				return err
			}
			g.Persistent, g.Autostart = persistent[d.UUID], autostart[d.UUID]
			guests = append(guests, g)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(guests, func(a, b maint.Guest) int { return strings.Compare(a.Name, b.Name) })
	return guests, nil
}

// Guest looks at one domain. It wraps maint.ErrNoGuest when there is none of
// that UUID or name; what reads as a UUID is looked up as one first.
func (h *Host) Guest(ctx context.Context, nameOrUUID string) (maint.Guest, error) {
	var g maint.Guest
	err := h.do(ctx, func(s *session) error {
		d, err := s.lookup(nameOrUUID)
		if err != nil {
			return err
		}
		if g, err = s.guest(d); err != nil {
			return err
		}
		persistent, err := call(s, "DomainIsPersistent", func(l *libvirt.Libvirt) (int32, error) {
			return l.DomainIsPersistent(d)
		})
		if err != nil {
			return err
		}
		g.Persistent = persistent != 0
		if !g.Persistent {
			return nil // cannot have autostart
		}
		autostart, err := call(s, "DomainGetAutostart", func(l *libvirt.Libvirt) (int32, error) {
			return l.DomainGetAutostart(d)
		})
		g.Autostart = autostart != 0
		return err
	})
	if err != nil {
		return maint.Guest{}, err
	}
	return g, nil
}

func (s *session) lookup(nameOrUUID string) (libvirt.Domain, error) {
	if _, ok := parseUUID(nameOrUUID); ok {
		d, err := s.domain(nameOrUUID)
		if !errors.Is(err, maint.ErrNoGuest) {
			return d, err
		}
	}
	return call(s, "DomainLookupByName", func(l *libvirt.Libvirt) (libvirt.Domain, error) {
		return l.DomainLookupByName(nameOrUUID)
	})
}

func (s *session) list(filter libvirt.ConnectListAllDomainsFlags) ([]libvirt.Domain, error) {
	return call(s, "ConnectListAllDomains", func(l *libvirt.Libvirt) ([]libvirt.Domain, error) {
		domains, _, err := l.ConnectListAllDomains(1, filter)
		return domains, err
	})
}

func (s *session) listSet(filter libvirt.ConnectListAllDomainsFlags) (map[libvirt.UUID]bool, error) {
	domains, err := s.list(filter)
	set := make(map[libvirt.UUID]bool, len(domains))
	for _, d := range domains {
		set[d.UUID] = true
	}
	return set, err
}

// guest looks at a domain, all but its persistence and autostart.
func (s *session) guest(d libvirt.Domain) (maint.Guest, error) {
	var g maint.Guest
	job := maint.Job{Operation: catchingUp}
	switch err := s.settle(d); {
	case err == nil:
		// The job comes before the state: were it asked for last, a migration
		// that ends in between would leave "running" and no job, which is a
		// guest that stays.
		job, err = s.job(d)
		if err != nil && !isCode(err, libvirt.ErrNoSupport) { // the test driver has no jobs
			return g, err
		}
	case !errors.Is(err, ErrBusy): // else to ask for the job would mean to wait for it
		return g, err
	}
	var err error
	if g.State, g.Reason, err = s.state(d); err != nil {
		return g, err
	}
	text, err := s.xml(d, 0)
	if err != nil {
		return g, err
	}
	if err := fill(&g, text); err != nil {
		return g, err
	}
	if g.State.Active() {
		g.Job = job.Operation
	}
	return g, nil
}

func (s *session) xml(d libvirt.Domain, flags libvirt.DomainXMLFlags) (string, error) {
	return call(s, "DomainGetXMLDesc", func(l *libvirt.Libvirt) (string, error) {
		return l.DomainGetXMLDesc(d, flags)
	})
}

// GuestXML is a domain's XML in its forms (virDomainGetXMLDesc).
type GuestXML struct {
	Live string // as it is now
	// Migratable is what a migration sends: without what libvirt adds by
	// itself, so that older versions take it.
	Migratable string
	// Portable is Migratable with its secrets (graphics passwords), fit for
	// CreatePaused.
	Portable string
	// Inactive is the definition that the next start uses, with its
	// secrets (graphics passwords), fit for Define; "" for a transient domain.
	Inactive string
	// CPU is the <cpu> element of Migratable, "" if there is none.
	CPU string
}

// GuestXML gives a domain's XML. It wraps maint.ErrNoGuest.
func (h *Host) GuestXML(ctx context.Context, uuid string) (GuestXML, error) {
	var x GuestXML
	err := h.onDomain(ctx, uuid, func(s *session, d libvirt.Domain) (err error) {
		if x.Live, err = s.xml(d, 0); err != nil {
			return err
		}
		if x.Migratable, err = s.xml(d, libvirt.DomainXMLMigratable); err != nil {
			return err
		}
		if x.Portable, err = s.xml(d, libvirt.DomainXMLMigratable|libvirt.DomainXMLSecure); err != nil {
			return err
		}
		if x.CPU, err = cpuElement(x.Migratable); err != nil {
			return err
		}
		persistent, err := call(s, "DomainIsPersistent", func(l *libvirt.Libvirt) (int32, error) {
			return l.DomainIsPersistent(d)
		})
		if err != nil || persistent == 0 {
			return err
		}
		x.Inactive, err = s.xml(d, libvirt.DomainXMLInactive|libvirt.DomainXMLSecure)
		return err
	})
	if err != nil {
		return GuestXML{}, err
	}
	return x, nil
}
