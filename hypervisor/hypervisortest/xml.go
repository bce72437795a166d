package hypervisortest

import (
	"encoding/xml"
	"fmt"
	"strings"

	"belay/agent/maint"
)

// xml makes a guest's XML, with what of it hypervisor.ParseGuest reads; id 0 is
// that of a guest that is off.
func (g *guest) xml(id int) (text, cpu string) {
	var b strings.Builder
	fmt.Fprintf(&b, "<domain type='%s'", escape(g.DomainType))
	if id != 0 {
		fmt.Fprintf(&b, " id='%d'", id)
	}
	fmt.Fprintf(&b, "><name>%s</name><uuid>%s</uuid><memory unit='b'>%d</memory>", escape(g.Name), g.UUID, g.MemoryBytes)
	var metadata string
	if len(g.AntiAffinity) > 0 {
		metadata = fmt.Sprintf("<placement xmlns='urn:belay:placement:1' anti-affinity='%s'/>", escape(strings.Join(g.AntiAffinity, " ")))
	}
	if g.Policy != "" {
		metadata += fmt.Sprintf("<p:policy xmlns:p='urn:belay:policy:1'>%s</p:policy>", escape(g.Policy))
	}
	if metadata != "" {
		fmt.Fprintf(&b, "<metadata>%s</metadata>", metadata)
	}
	b.WriteString(g.memoryXML())
	fmt.Fprintf(&b, "<vcpu>%d</vcpu><os><type machine='%s'>hvm</type></os>", g.VCPUs, escape(g.MachineType))
	if g.CPUModel != "" {
		cpu = fmt.Sprintf("<cpu mode='custom' match='exact' check='none'><model fallback='forbid'>%s</model></cpu>", escape(g.CPUModel))
	}
	b.WriteString(cpu)
	b.WriteString("<devices>")
	for _, d := range g.Disks {
		b.WriteString(diskXML(d))
	}
	if g.Agent != maint.AgentNone {
		fmt.Fprintf(&b, "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' state='%s'/></channel>", g.Agent)
	}
	b.WriteString(g.devices)
	b.WriteString("</devices></domain>")
	return b.String(), cpu
}

func (g *guest) memoryXML() string {
	var inside string
	switch g.MemorySource {
	case "":
	case "hugepages":
		inside = "<hugepages/>"
	default:
		inside = fmt.Sprintf("<source type='%s'/>", escape(g.MemorySource))
	}
	if g.MemoryShared {
		inside += "<access mode='shared'/>"
	}
	if inside == "" {
		return ""
	}
	return "<memoryBacking>" + inside + "</memoryBacking>"
}

func diskXML(d maint.Disk) string {
	source := map[string]string{"file": "file", "block": "dev", "network": "name"}[d.Type]
	var flags string
	if d.ReadOnly {
		flags += "<readonly/>"
	}
	if d.Shared {
		flags += "<shareable/>"
	}
	if source != "" {
		flags += fmt.Sprintf("<source %s='%s'/>", source, escape(d.Source))
	}
	return fmt.Sprintf("<disk type='%s' device='%s'><driver type='%s' cache='%s'/><target dev='%s'/>%s</disk>",
		escape(d.Type), escape(d.Kind), escape(d.Format), escape(d.Cache), escape(d.Target), flags)
}

func escape(s string) string {
	var b strings.Builder
	_ = xml.EscapeText(&b, []byte(s)) // a Builder does not fail
	return b.String()
}
