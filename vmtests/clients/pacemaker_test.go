package clients

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"

	"belay/agent/maint"
)

// TestPacemaker has a cluster of two guests, with Corosync, Pacemaker and
// resource-agents' azure-events-az as Debian has them. The cluster moves its
// application away before it approves an event, and back when that is over; an
// event of the other guest has to wait until then.
func TestPacemaker(t *testing.T) {
	t.Parallel()
	h, nodes := newCluster(t)
	one, two := nodes[0], nodes[1]
	one.hasApp(t)

	first := h.announce(maint.ImpactFreeze, one.guest)
	h.awaitApproval(first, one.guest)
	if at, err := one.app(t); err != nil || at == one.host {
		t.Errorf("%s has approved with app on %q (%v)", one.host, at, err)
	}
	two.hasApp(t)
	second := h.announce(maint.ImpactReboot, two.guest)
	one.becomes(t, "IN_EVENT")
	two.becomes(t, "ON_HOLD")
	if a := h.event(second).Approval; a != nil {
		t.Errorf("%+v has approved that the other is disturbed, too", a)
	}
	h.start(first)
	h.end(first, one.guest)

	h.awaitApproval(second, two.guest)
	one.hasApp(t)
	one.becomes(t, "AVAILABLE")
	two.becomes(t, "IN_EVENT")
	h.cancel(second)
	two.becomes(t, "AVAILABLE")
	for _, n := range nodes {
		if pending := n.attribute(t, "azure-events-az_pendingEventIDs"); pending != "" {
			t.Errorf("%s still waits for %s", n.host, pending)
		}
	}
}

// node is a guest in a cluster. Its name there, and to itself, is another than
// the host has for it.
type node struct {
	*guest
	host string
	pid  int // process 1
	said strings.Builder
}

// newCluster starts Corosync and Pacemaker in two guests.
func newCluster(t *testing.T) (*host, []*node) {
	t.Helper()
	h, guests := newHost(t, "db-a", "db-b")
	need(t, "corosync", "pacemakerd", "crm_attribute", "crm_simulate", "/usr/lib/ocf/resource.d/heartbeat/azure-events-az")
	if err := guests[0].link.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"},
		PeerName: "eth0", PeerNamespace: netlink.NsFd(guests[1].ns)}); err != nil {
		t.Fatal(err)
	}
	var nodes []*node
	for i, g := range guests {
		n := &node{guest: g, host: fmt.Sprintf("ha-%d", i+1)}
		g.address("eth0", fmt.Sprintf("10.78.0.%d/24", i+1))
		n.boot(t)
		nodes = append(nodes, n)
	}
	return h, nodes
}

func (n *node) boot(t *testing.T) {
	t.Helper()
	dir, err := filepath.Abs("testdata")
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command("sh", filepath.Join(dir, "node.sh"), n.host, dir)
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS}
	c.Stdout, c.Stderr = &n.said, &n.said
	life, err := c.StdinPipe() // also ends with this process, whatever becomes of it
	if err == nil {
		err = n.in(c.Start)
	}
	if err != nil {
		t.Fatal(err)
	}
	n.pid = c.Process.Pid
	t.Cleanup(func() {
		if t.Failed() {
			log, err := n.run(t, "grep", "-E", "azure-events|notice|warning|error", "/var/log/pacemaker/pacemaker.log")
			t.Logf("%s: %v: %s", n.host, err, log)
		}
		life.Close()
		if err := c.Wait(); err != nil {
			t.Errorf("%s: %v", n.host, err)
		}
		if t.Failed() {
			t.Logf("%s: %s", n.host, &n.said)
		}
	})
}

// run runs a program in the node.
func (n *node) run(t *testing.T, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
	defer cancel()
	inside := []string{"--target", strconv.Itoa(n.pid), "--mount", "--pid", "--uts", "--"}
	return n.program(exec.CommandContext(ctx, "nsenter", append(inside, args...)...))
}

// hasApp waits until the cluster has its application on the node.
func (n *node) hasApp(t *testing.T) {
	t.Helper()
	var out string
	var err error
	await(t, n.host+" runs app", func() bool {
		out, err = n.app(t)
		return err == nil && out == n.host
	}, func() string { return fmt.Sprintf("%q, %v", out, err) })
}

// app is the node that has the application; "": none.
func (n *node) app(t *testing.T) (host string, err error) {
	return n.run(t, "crm_resource", "--resource", "app", "--locate", "--quiet")
}

// becomes waits until the agent has the node in a state.
func (n *node) becomes(t *testing.T, state string) {
	t.Helper()
	var out string
	await(t, n.host+" is "+state, func() bool {
		out = n.attribute(t, "azure-events-az_curNodeState")
		return out == state
	}, func() string { return "it is " + out })
}

func (n *node) attribute(t *testing.T, name string) string {
	t.Helper()
	out, err := n.run(t, "crm_attribute", "--node", n.host, "--name", name, "--query", "--quiet", "--default", "")
	if err != nil {
		t.Fatal(err)
	}
	return out
}
