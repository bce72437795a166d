package hypervisor

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/digitalocean/go-libvirt"

	"belay/agent/maint"
)

// capabilitiesXML is the part of <capabilities> that Belay reads.
type capabilitiesXML struct {
	Host struct {
		UUID string `xml:"uuid"`
		CPU  struct {
			Arch  string `xml:"arch"`
			Model string `xml:"model"`
		} `xml:"cpu"`
	} `xml:"host"`
	Guests []struct {
		Arch struct {
			Name     string       `xml:"name,attr"`
			Machines []machineXML `xml:"machine"`
			Domains  []struct {
				Type     string       `xml:"type,attr"`
				Machines []machineXML `xml:"machine"` // where they differ from the arch's
			} `xml:"domain"`
		} `xml:"arch"`
	} `xml:"guest"`
}

type machineXML struct {
	Name      string `xml:",chardata"`
	Canonical string `xml:"canonical,attr"` // what an alias stands for
}

// fixedFor is how long what hardly ever changes is believed. libvirt takes a
// third of a second to put its capabilities together, more than all else that a
// migration asks for.
const fixedFor = 10 * time.Minute

// fixed is what was learnt of the host at a time, without its memory figures.
type fixed struct {
	info maint.Host
	at   time.Time
}

// Info describes the host. Domain and machine types are those for guests of
// the host's own architecture. Memory figures are of this moment, the rest is
// at most ten minutes old and of this run of libvirt.
//
// Sources: virConnectGetHostname, virConnectGetCapabilities, virNodeGetInfo,
// virNodeGetMemoryStats (free + buffers + cached), virConnectGetLibVersion,
// virConnectGetVersion.
func (h *Host) Info(ctx context.Context) (info maint.Host, err error) {
	err = h.do(ctx, func(s *session) error {
		known := h.fixed.Load()
		if known == nil || time.Since(known.at) > fixedFor {
			info, err := s.fixedInfo()
			if err != nil {
				return err
			}
			known = &fixed{info, time.Now()}
			h.fixed.Store(known)
		}
		info = known.info
		info.DomainTypes, info.MachineTypes = slices.Clone(info.DomainTypes), slices.Clone(info.MachineTypes)
		return s.memory(&info)
	})
	if err != nil {
		return maint.Host{}, err
	}
	return info, nil
}

// fixedInfo asks for all but the memory that is free.
func (s *session) fixedInfo() (info maint.Host, err error) {
	if info.Name, err = call(s, "ConnectGetHostname", (*libvirt.Libvirt).ConnectGetHostname); err != nil {
		return info, err
	}
	text, err := call(s, "ConnectGetCapabilities", (*libvirt.Libvirt).ConnectGetCapabilities)
	if err != nil {
		return info, err
	}
	if err := fillCapabilities(&info, text); err != nil {
		return info, err
	}
	if info.CPUs, info.MemoryBytes, err = s.node(); err != nil {
		return info, err
	}
	lib, err := call(s, "ConnectGetLibVersion", (*libvirt.Libvirt).ConnectGetLibVersion)
	if err != nil {
		return info, err
	}
	hv, err := call(s, "ConnectGetVersion", (*libvirt.Libvirt).ConnectGetVersion)
	if err != nil {
		return info, err
	}
	info.LibvirtVersion, info.QEMUVersion = version(lib), version(hv)
	return info, nil
}

// node gives the number of processors and the bytes of memory.
func (s *session) node() (cpus int, memory uint64, err error) {
	_, err = call(s, "NodeGetInfo", func(l *libvirt.Libvirt) (struct{}, error) {
		_, kib, n, _, _, _, _, _, err := l.NodeGetInfo()
		cpus, memory = int(n), kib<<10
		return struct{}{}, err
	})
	return cpus, memory, err
}

// memory sets what there is, and what guests could have of it: memory that is
// free, and memory that the kernel gives back when asked (buffers, page cache).
// The total is taken from the same source, /proc/meminfo: virNodeGetInfo adds
// up the NUMA nodes, and misses memory that is in none.
func (s *session) memory(info *maint.Host) error {
	const allCells = -1 // VIR_NODE_MEMORY_STATS_ALL_CELLS
	stats, err := call(s, "NodeGetMemoryStats", func(l *libvirt.Libvirt) ([]libvirt.NodeGetMemoryStats, error) {
		_, n, err := l.NodeGetMemoryStats(0, allCells, 0) // how many there are
		if err != nil {
			return nil, err
		}
		stats, _, err := l.NodeGetMemoryStats(n, allCells, 0)
		return stats, err
	})
	if isCode(err, libvirt.ErrNoSupport) { // the test driver has the plain figure only
		info.FreeMemoryBytes, err = call(s, "NodeGetFreeMemory", (*libvirt.Libvirt).NodeGetFreeMemory)
		return err
	}
	for _, st := range stats {
		switch st.Field {
		case "total":
			info.MemoryBytes = st.Value << 10
		case "free", "buffers", "cached":
			info.FreeMemoryBytes += st.Value << 10
		}
	}
	return err
}

// fillCapabilities sets what <capabilities> tells.
func fillCapabilities(info *maint.Host, text string) error {
	var caps capabilitiesXML
	if err := xml.Unmarshal([]byte(text), &caps); err != nil {
		return fmt.Errorf("cannot read capabilities: %w", err)
	}
	info.UUID = caps.Host.UUID
	info.Arch, info.CPUModel = caps.Host.CPU.Arch, caps.Host.CPU.Model
	var types, machines []string
	add := func(ms []machineXML) {
		for _, m := range ms {
			machines = append(machines, strings.TrimSpace(m.Name))
			if m.Canonical != "" {
				machines = append(machines, m.Canonical)
			}
		}
	}
	for _, g := range caps.Guests {
		if g.Arch.Name != info.Arch {
			continue
		}
		add(g.Arch.Machines)
		for _, d := range g.Arch.Domains {
			types = append(types, d.Type)
			add(d.Machines)
		}
	}
	info.DomainTypes, info.MachineTypes = unique(types), unique(machines)
	return nil
}

// unique sorts words and leaves each once.
func unique(words []string) []string {
	slices.Sort(words)
	return slices.Compact(words)
}

// version gives libvirt's number (major × 1,000,000 + minor × 1,000 + release)
// as text.
func version(v uint64) string {
	return fmt.Sprintf("%d.%d.%d", v/1_000_000, v/1_000%1_000, v%1_000)
}

// CompareCPU returns nil when this host can run the CPU that the <cpu> element
// describes, in a domain of that type ("kvm", "qemu"), architecture and machine
// type, and *IncompatibleCPU with libvirt's reason when it cannot. Empty
// strings leave the choice to libvirt; an empty cpuXML fits everywhere. An *Error
// says that libvirt could not tell, for instance of a model that it does not
// know.
//
// The answer is about the CPU as described, whatever its check attribute. A
// running guest's CPU with check='full' lists the features it really got. With
// check='none' it does not: QEMU may have left out on the source what is missed
// here. And host-passthrough and maximum, which list nothing, always fit.
//
// Source: virConnectCompareHypervisorCPU with
// VIR_CONNECT_COMPARE_CPU_FAIL_INCOMPATIBLE.
func (h *Host) CompareCPU(ctx context.Context, domainType, arch, machine, cpuXML string) error {
	if cpuXML == "" {
		return nil
	}
	return h.do(ctx, func(s *session) error {
		result, err := call(s, "ConnectCompareHypervisorCPU", func(l *libvirt.Libvirt) (int32, error) {
			return l.ConnectCompareHypervisorCPU(nil, opt(arch), opt(machine), opt(domainType), cpuXML,
				uint32(libvirt.ConnectCompareCPUFailIncompatible))
		})
		var e *Error
		if errors.As(err, &e) && e.Code == int(libvirt.ErrCPUIncompatible) {
			return &IncompatibleCPU{Reason: e.Message}
		}
		if err == nil && libvirt.CPUCompareResult(result) == libvirt.CPUCompareIncompatible {
			return &IncompatibleCPU{Reason: "libvirt gives no reason"}
		}
		return err
	})
}

// opt is libvirt's nullable string: nil when empty.
func opt(s string) libvirt.OptString {
	if s == "" {
		return nil
	}
	return libvirt.OptString{s}
}
