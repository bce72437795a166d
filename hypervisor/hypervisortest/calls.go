package hypervisortest

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"belay/agent/maint"
	"belay/hypervisor"
)

// URI is the destination URI of migrations to this host.
func (h *Host) URI() string { return "qemu+tcp://" + h.info.Name + "/system" }

// Name is the host's name.
func (h *Host) Name() string { return h.info.Name }

// Run returns when ctx ends or the host is closed. Events flow without it.
func (h *Host) Run(ctx context.Context) error {
	select {
	case <-ctx.Done():
	case <-h.closed:
	}
	return nil
}

// Close ends all subscriptions and Run.
func (h *Host) Close() error {
	h.closeOnce.Do(func() { close(h.closed) })
	h.hub.Close()
	return nil
}

// Subscribe gives all events from now on.
func (h *Host) Subscribe() (events <-chan maint.Event, cancel func()) { return h.hub.Subscribe() }

// locked makes a call whose effect is immediate.
func locked[T any](ctx context.Context, h *Host, op string, effect func() (T, error)) (T, error) {
	return do(ctx, h, op, true, func(context.Context) (T, error) {
		h.w.mu.Lock()
		defer h.w.mu.Unlock()
		return effect()
	})
}

// onGuest makes a call on a guest whose effect is immediate.
func onGuest[T any](ctx context.Context, h *Host, op, uuid string, effect func(*guest) (T, error)) (T, error) {
	return locked(ctx, h, op, func() (T, error) {
		g, err := h.find(uuid)
		if err != nil {
			var none T
			return none, err
		}
		return effect(g)
	})
}

func (h *Host) find(uuid string) (*guest, error) {
	if g, ok := h.guests[uuid]; ok {
		return g, nil
	}
	return nil, h.failed("DomainLookupByUUID", codeNoDomain,
		"Domain not found: no domain with matching uuid '"+uuid+"'", maint.ErrNoGuest)
}

// Ping returns nil while libvirt is up.
func (h *Host) Ping(ctx context.Context) error {
	_, err := locked(ctx, h, "Ping", func() (struct{}, error) { return struct{}{}, nil })
	return err
}

// Info describes the host. Its free memory is what active guests leave.
func (h *Host) Info(ctx context.Context) (maint.Host, error) {
	return locked(ctx, h, "Info", func() (maint.Host, error) {
		info := h.info
		info.FreeMemoryBytes = info.MemoryBytes
		for _, g := range h.guests {
			if g.State.Active() {
				info.FreeMemoryBytes -= min(g.MemoryBytes, info.FreeMemoryBytes)
			}
		}
		return info, nil
	})
}

// Supplies tells of the networks, storage pools and secrets that the host was given.
func (h *Host) Supplies(ctx context.Context) (maint.Supplies, error) {
	return locked(ctx, h, "Supplies", func() (maint.Supplies, error) {
		return maint.Supplies{Networks: maps.Clone(h.networks), Pools: maps.Clone(h.storage), Secrets: slices.Clone(h.secrets)}, nil
	})
}

// HugePages tells of those that the host was made with. Its guests take none.
func (h *Host) HugePages(ctx context.Context) ([]maint.PagePool, error) {
	return locked(ctx, h, "HugePages", func() ([]maint.PagePool, error) { return slices.Clone(h.pools), nil })
}

// Guests lists all guests, sorted by name.
func (h *Host) Guests(ctx context.Context) ([]maint.Guest, error) {
	return locked(ctx, h, "Guests", func() ([]maint.Guest, error) {
		guests := make([]maint.Guest, 0, len(h.guests))
		for _, g := range h.guests {
			guests = append(guests, g.view())
		}
		slices.SortFunc(guests, func(a, b maint.Guest) int { return strings.Compare(a.Name, b.Name) })
		return guests, nil
	})
}

// Guest looks at one guest.
func (h *Host) Guest(ctx context.Context, nameOrUUID string) (maint.Guest, error) {
	return locked(ctx, h, "Guest", func() (maint.Guest, error) {
		for _, matches := range []func(*guest) bool{
			func(g *guest) bool { return bare(g.UUID) == bare(nameOrUUID) },
			func(g *guest) bool { return g.Name == nameOrUUID },
		} {
			for _, g := range h.guests {
				if matches(g) {
					return g.view(), nil
				}
			}
		}
		return maint.Guest{}, h.failed("DomainLookupByName", codeNoDomain,
			"Domain not found: no domain with matching name '"+nameOrUUID+"'", maint.ErrNoGuest)
	})
}

// bare is a UUID without its hyphens, which libvirt takes too.
func bare(uuid string) string { return strings.ReplaceAll(uuid, "-", "") }

// view is the guest as callers see it, sharing nothing with it.
func (g *guest) view() maint.Guest {
	v := g.Guest
	v.Disks, v.Devices = slices.Clone(v.Disks), slices.Clone(v.Devices)
	switch {
	case g.out != nil:
		v.Job = "migration out"
	case g.in != nil:
		v.Job = "migration in"
	case g.lag && g.State.Active():
		v.Job = "catching up"
	}
	return v
}

// idle returns hypervisor.ErrBusy if the guest has a job.
func (g *guest) idle() error {
	if job := g.view().Job; job != "" {
		return fmt.Errorf("guest %s: %w (%s)", g.Name, hypervisor.ErrBusy, job)
	}
	return nil
}

// GuestXML gives XML made from the guest, or the definition it was given.
func (h *Host) GuestXML(ctx context.Context, uuid string) (hypervisor.GuestXML, error) {
	return onGuest(ctx, h, "GuestXML", uuid, func(g *guest) (hypervisor.GuestXML, error) {
		text, cpu := g.xml(g.ID)
		x := hypervisor.GuestXML{Live: text, Migratable: text, Portable: text, CPU: cpu}
		if g.Persistent {
			x.Inactive, _ = g.xml(0)
			if g.definition != "" {
				x.Inactive = g.definition
			}
		}
		return x, nil
	})
}

// CompareCPU refuses what HostOptions.CannotRun names.
func (h *Host) CompareCPU(ctx context.Context, domainType, arch, machine, cpuXML string) error {
	_, err := locked(ctx, h, "CompareCPU", func() (struct{}, error) {
		for _, word := range h.cannotRun {
			if strings.Contains(cpuXML, word) {
				return struct{}{}, &hypervisor.IncompatibleCPU{Reason: "Host CPU does not provide required features: " + word}
			}
		}
		return struct{}{}, nil
	})
	return err
}

// Job gives the statistics of the guest's migration, or State "none".
func (h *Host) Job(ctx context.Context, uuid string) (maint.Job, error) {
	return onGuest(ctx, h, "Job", uuid, func(g *guest) (maint.Job, error) {
		switch {
		case g.out != nil:
			return g.out.stats(), nil
		case g.in != nil:
			return maint.Job{Active: true, Operation: "migration in", State: "unbounded"}, nil
		}
		return maint.Job{State: "none"}, nil
	})
}

// CompletedJob gives the statistics of the migration by which the guest came.
func (h *Host) CompletedJob(ctx context.Context, uuid string) (maint.Job, error) {
	return onGuest(ctx, h, "CompletedJob", uuid, func(g *guest) (maint.Job, error) {
		if g.completed == nil {
			return maint.Job{}, h.failed("DomainGetJobStats", 0, "no completed job", maint.ErrNoJob)
		}
		return *g.completed, nil
	})
}

// AbortJob cancels the guest's outgoing migration.
func (h *Host) AbortJob(ctx context.Context, uuid string) error {
	_, err := onGuest(ctx, h, "AbortJob", uuid, func(g *guest) (struct{}, error) {
		switch {
		case g.out != nil:
			if g.out.post.begun {
				return struct{}{}, h.failed("DomainAbortJob", codeOperationInvalid, "Requested operation is not valid: cannot abort migration in post-copy mode")
			}
			// Once the destination runs the guest there is nothing to cancel.
			if g.out.phase != PhaseResumed {
				g.out.end(h.failed(opPerform, codeOperationAborted, "operation aborted: migration out job: canceled by client"))
			}
			return struct{}{}, nil
		case g.in != nil:
			return struct{}{}, fmt.Errorf("cannot abort the job of %s: %w", g.Name, hypervisor.ErrIncoming)
		}
		return struct{}{}, h.failed("DomainAbortJob", 0, "no job to abort", maint.ErrNoJob)
	})
	return err
}

// SetMaxDowntime lets the guest's migration end with a pause of so long.
func (h *Host) SetMaxDowntime(ctx context.Context, uuid string, d time.Duration) error {
	_, err := onGuest(ctx, h, "SetMaxDowntime", uuid, func(g *guest) (struct{}, error) {
		if g.out != nil {
			g.out.pause = d
		}
		return struct{}{}, nil
	})
	return err
}

// LiftBandwidth takes the limit off the guest's migration, which goes on also if it
// was held.
func (h *Host) LiftBandwidth(ctx context.Context, uuid string) error {
	_, err := onGuest(ctx, h, "LiftBandwidth", uuid, func(g *guest) (struct{}, error) {
		if g.out != nil {
			g.out.params.BandwidthMiBs, g.out.lifted = 0, true
		}
		return struct{}{}, nil
	})
	return err
}

// SetAutostart says whether the guest starts with the host.
func (h *Host) SetAutostart(ctx context.Context, uuid string, on bool) error {
	_, err := onGuest(ctx, h, "SetAutostart", uuid, func(g *guest) (struct{}, error) {
		if err := g.idle(); err != nil {
			return struct{}{}, err
		}
		if !g.Persistent {
			return struct{}{}, h.failed("DomainSetAutostart", codeOperationInvalid,
				"Requested operation is not valid: cannot set autostart for transient domain")
		}
		g.Autostart = on
		return struct{}{}, nil
	})
	return err
}

// SetNote keeps a text with a guest.
func (h *Host) SetNote(ctx context.Context, uuid, text string) error {
	_, err := onGuest(ctx, h, "SetNote", uuid, func(g *guest) (struct{}, error) {
		if err := g.idle(); err != nil {
			return struct{}{}, err
		}
		g.note = text
		return struct{}{}, nil
	})
	return err
}

// SetPolicy keeps a policy with a guest.
func (h *Host) SetPolicy(ctx context.Context, uuid, text string) error {
	_, err := onGuest(ctx, h, "SetPolicy", uuid, func(g *guest) (struct{}, error) {
		if err := g.idle(); err != nil {
			return struct{}{}, err
		}
		g.Policy = text
		return struct{}{}, nil
	})
	return err
}

// Note gives it back.
func (h *Host) Note(ctx context.Context, uuid string) (string, error) {
	return onGuest(ctx, h, "Note", uuid, func(g *guest) (string, error) { return g.note, nil })
}

// Define makes a guest persistent, or adds one that is shut off.
func (h *Host) Define(ctx context.Context, text string) error {
	_, err := locked(ctx, h, "Define", func() (struct{}, error) {
		const op = "DomainDefineXMLFlags"
		parsed, err := hypervisor.ParseGuest(text)
		if err != nil {
			return struct{}{}, h.failed(op, 27, "XML error: "+err.Error())
		}
		for _, other := range h.guests {
			if other.Name == parsed.Name && other.UUID != parsed.UUID {
				return struct{}{}, h.failed(op, codeOperationFailed, fmt.Sprintf(
					"operation failed: domain '%s' already exists with uuid %s", other.Name, other.UUID))
			}
		}
		g, known := h.guests[parsed.UUID]
		if !known {
			g = &guest{Guest: parsed}
			g.become(maint.GuestShutoff, "unknown")
			h.guests[g.UUID] = g
		}
		detail := "added"
		if known && g.Persistent {
			detail = "updated"
		}
		g.Persistent, g.definition = true, text
		h.lifecycle(g, "defined", detail)
		return struct{}{}, nil
	})
	return err
}

// Launch starts a guest that is shut off.
func (h *Host) Launch(ctx context.Context, uuid string) error {
	_, err := onGuest(ctx, h, "Launch", uuid, func(g *guest) (struct{}, error) {
		switch {
		case g.State.Active():
		case g.rival:
			return struct{}{}, h.failed("DomainCreateWithFlags", codeResourceBusy, "resource busy: Lockspace resource is locked", maint.ErrLocked)
		default:
			h.boot(g)
		}
		return struct{}{}, nil
	})
	return err
}

// UndefineInactive removes a guest that is not active.
func (h *Host) UndefineInactive(ctx context.Context, uuid string) error {
	_, err := onGuest(ctx, h, "UndefineInactive", uuid, func(g *guest) (struct{}, error) {
		if g.State.Active() {
			return struct{}{}, fmt.Errorf("cannot undefine %s: %w", g.Name, hypervisor.ErrActive)
		}
		delete(h.guests, uuid)
		h.lifecycle(g, "undefined", "removed")
		return struct{}{}, nil
	})
	return err
}
