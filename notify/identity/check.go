package identity

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"belay/agent/maint"
	"belay/notify"
)

// checks collects lines for belay doctor.
type checks []maint.Check

func (c *checks) add(result maint.CheckResult, name, text, remedy string) {
	*c = append(*c, maint.Check{Rung: "host", Name: name, Result: result, Text: text, Remedy: remedy})
}

// ask adds one line for a question whose error is the answer.
func (c *checks) ask(name, good, remedy string, err error) {
	if err != nil {
		c.add(maint.CheckFail, name, err.Error(), remedy)
		return
	}
	c.add(maint.CheckOK, name, good, "")
}

// Check says, for belay doctor, whether guests that were set can ask and are told
// apart.
func (g *Gate) Check(ctx context.Context) []maint.Check {
	g.change.Lock()
	defer g.change.Unlock()
	var c checks
	c.ask("metadata address", notify.Address+" is on no device of this host", "", g.taken())
	c.ask("metadata port", "nobody else listens on port 80 of it", "", g.stolen())
	switch found, err := g.strangers(); {
	case err != nil:
		c.add(maint.CheckWarn, "metadata rules of others", err.Error(), "")
	case len(found) > 0:
		c.add(maint.CheckWarn, "metadata rules of others", "nftables rules of others name "+notify.Address+": "+strings.Join(found, ", "), "see that they let guests' requests pass")
	default:
		c.add(maint.CheckOK, "metadata rules of others", "no nftables rules of others name "+notify.Address, "")
	}
	c.ask("metadata sysctls", "the kernel hands marks to sockets and answers ARP", "", g.sysctls())
	c.ask("metadata rules", fmt.Sprintf("nftables has the rules of %d ports", len(g.taps)), "have the ports set again: restart belayd", g.inPlace())
	links, err := g.links()
	for _, t := range g.taps {
		if ctx.Err() != nil {
			break
		}
		if err == nil {
			c.ask("metadata of "+t.Tap, "guest "+t.Guest+" can ask", "", g.reachable(t, links))
		} else {
			c.add(maint.CheckFail, "metadata of "+t.Tap, err.Error(), "")
		}
	}
	return c
}

// stolen is the error if somebody else's socket is where ours should be.
func (g *Gate) stolen() error {
	if g.who.listener() != nil {
		return nil // nobody else can
	}
	sockets, err := g.listeners()
	if err != nil || len(sockets) == 0 {
		return err
	}
	return g.listening(nil)
}

// sysctls is the error if one has been set so that guests cannot ask.
func (g *Gate) sysctls() error {
	return g.inside(func() error {
		var errs []error
		is := func(name, want, why string) {
			v, err := os.ReadFile(filepath.Join("/proc/sys/net/ipv4", name))
			if err != nil {
				errs = append(errs, err)
			} else if got := strings.TrimSpace(string(v)); got != want {
				errs = append(errs, fmt.Errorf("sysctl net/ipv4/%s is %s: %s (set it to %s)", name, got, why, want))
			}
		}
		is("tcp_fwmark_accept", "1", "nobody is known")
		scopes := []string{"all"}
		for _, b := range g.bridges {
			scopes = append(scopes, b.name)
			is("conf/"+b.name+"/src_valid_mark", "1", "guests of other subnets get no answer")
		}
		for _, s := range scopes {
			is("conf/"+s+"/arp_ignore", "0", "ARP for "+notify.Address+" is not answered")
			is("conf/"+s+"/arp_filter", "0", "ARP for "+notify.Address+" is not answered")
		}
		return errors.Join(errs...)
	})
}

// inPlace is the error if rules or routes have been taken away by somebody.
func (g *Gate) inPlace() error {
	c, err := g.nft()
	if err != nil {
		return err
	}
	want := make(map[*nftables.Chain]int)
	for _, r := range rules(g.marks.mask) {
		want[r.chain]++
	}
	for ch, n := range want {
		if rs, err := c.GetRules(ch.Table, ch); err != nil || len(rs) != n {
			return fmt.Errorf("nftables chain %s %s %s is not as it was made", family(ch.Table.Family), tableName, ch.Name)
		}
	}
	for s, want := range contents(g.taps, g.bridges) {
		got, err := c.GetSetElements(s)
		if err != nil || len(got) != len(want) {
			return fmt.Errorf("nftables set %s %s %s is not as it was made", family(s.Table.Family), tableName, s.Name)
		}
	}
	ours, err := g.ourRules()
	if err != nil {
		return err
	}
	if len(ours) != 2*len(g.bridges) {
		return fmt.Errorf("there are %d routing rules instead of %d", len(ours), 2*len(g.bridges))
	}
	return nil
}

// reachable is the error if a guest's frames do not come to the host.
func (g *Gate) reachable(t tap, links map[int]netlink.Link) error {
	l, b := links[t.Ifindex], links[t.bridge]
	switch {
	case l == nil:
		return fmt.Errorf("tap %s of guest %s has gone", t.Tap, t.Guest)
	case b == nil:
		return fmt.Errorf("bridge %s of guest %s has gone", t.Bridge, t.Guest)
	case l.Attrs().Flags&net.FlagUp == 0:
		return fmt.Errorf("tap %s of guest %s is down", t.Tap, t.Guest)
	case b.Attrs().Flags&net.FlagUp == 0:
		return fmt.Errorf("bridge %s of guest %s is down (set it up)", t.Bridge, t.Guest)
	case l.Attrs().MasterIndex == 0 || l.Attrs().MasterIndex != t.bridge && l.Attrs().MasterIndex != b.Attrs().ParentIndex:
		return fmt.Errorf("tap %s of guest %s is not on bridge %s", t.Tap, t.Guest, t.Bridge)
	}
	routes, err := g.routes(g.cfg.Tables + int(g.bridges[t.bridge].slot))
	if err == nil && len(routes) != len(g.routesOf(0, 0)) {
		err = fmt.Errorf("bridge %s has lost its routes (have the ports set again: restart belayd)", t.Bridge)
	}
	return err
}
