package clients

import (
	"context"
	"encoding/json"
	"os/exec"
	"strings"
	"testing"

	"belay/agent/maint"
)

// TestCloudInit has cloud-init's data sources read all that there is in EC2's and
// in Azure's form, which they give up when a part of it is missing.
func TestCloudInit(t *testing.T) {
	t.Parallel()
	const python = "/usr/bin/python3" // Debian's, which has cloud-init
	h, guests := newHost(t, "web-1")
	need(t, python, "cloud-init")
	g := guests[0]
	reboot := h.announce(maint.ImpactReboot, g)
	h.announce(maint.ImpactPreempt, g)

	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	out, err := g.program(exec.CommandContext(ctx, python, "-B", "testdata/crawl.py"))
	if err != nil {
		t.Fatal(err)
	}
	var found struct {
		EC2 struct {
			Meta struct {
				ID     string `json:"instance-id"`
				Name   string `json:"local-hostname"`
				IP     string `json:"local-ipv4"`
				Events struct{ Maintenance struct{ Scheduled string } }
				Spot   struct {
					Action struct{ Action string } `json:"instance-action"`
				}
			} `json:"meta-data"`
		}
		Azure   struct{ Compute struct{ Name, VMID string } }
		Network struct {
			Ethernets map[string]struct{ Match struct{ MACAddress string } }
		}
	}
	if err := json.Unmarshal([]byte(out), &found); err != nil {
		t.Fatalf("%s: %v", out, err)
	}
	m := found.EC2.Meta
	if m.ID != g.UUID || m.Name != g.Name || m.IP != "10.78.0.1" ||
		!strings.Contains(m.Events.Maintenance.Scheduled, string(reboot)) || m.Spot.Action.Action != "terminate" {
		t.Errorf("in EC2's form it has found %s", out)
	}
	if found.Azure.Compute.Name != g.Name || found.Azure.Compute.VMID != g.UUID || found.Network.Ethernets["eth0"].Match.MACAddress != "52:54:00:00:00:01" {
		t.Errorf("in Azure's form it has found %s", out)
	}
}
