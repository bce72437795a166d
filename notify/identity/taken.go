package identity

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"belay/notify"
)

// taken is the error if 169.254.169.254 is an address of this host.
func (g *Gate) taken() error {
	links, err := g.links()
	if err != nil {
		return err
	}
	addrs, err := g.addresses()
	if err != nil {
		return err
	}
	for _, a := range addrs {
		if !a.IP.Equal(service) {
			continue
		}
		on := "device " + strconv.Itoa(a.LinkIndex)
		if l := links[a.LinkIndex]; l != nil {
			on = l.Attrs().Name
		}
		return fmt.Errorf("%w: %s has the address %s (remove it, or have that service answer guests)", ErrTaken, on, notify.Address)
	}
	return nil
}

// listening makes an error say who it is that listens on our port.
func (g *Gate) listening(err error) error {
	sockets, diagErr := g.listeners()
	if diagErr != nil {
		return errors.Join(err, diagErr)
	}
	for _, s := range sockets {
		err = fmt.Errorf("%w: %s listens on %s (have it listen on other addresses only)", ErrTaken, ownerOf(s.INode), net.JoinHostPort(s.ID.Source.String(), "80"))
	}
	return err
}

// listeners are the sockets that keep us from listening, or would.
func (g *Gate) listeners() (found []*netlink.Socket, err error) {
	const tcpListen = 10 // TCP_LISTEN of include/net/tcp_states.h
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		all, err := dump(func() ([]*netlink.Socket, error) { return g.link.SocketDiagTCP(family) })
		if err != nil {
			return nil, fmt.Errorf("cannot list listening sockets: %w", err)
		}
		for _, s := range all {
			if s.State == tcpListen && s.ID.SourcePort == 80 && (s.ID.Source.IsUnspecified() || s.ID.Source.Equal(service)) {
				found = append(found, s)
			}
		}
	}
	return found, nil
}

// ownerOf is the process that has a socket open, as "nginx (process 123)".
func ownerOf(inode uint32) string {
	want := fmt.Sprintf("socket:[%d]", inode)
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err != nil || to != want {
			continue
		}
		proc := filepath.Dir(filepath.Dir(fd))
		comm, _ := os.ReadFile(filepath.Join(proc, "comm"))
		return fmt.Sprintf("%s (process %s)", strings.TrimSpace(string(comm)), filepath.Base(proc))
	}
	return "somebody"
}

// strangers are the nftables chains of others whose rules or sets name our
// address, as "ip nat PREROUTING". Rules of iptables-legacy cannot be seen.
func (g *Gate) strangers() (found []string, err error) {
	c, err := g.nft()
	if err != nil {
		return nil, fmt.Errorf("cannot talk to nftables: %w", err)
	}
	all, err := c.ListChains()
	if err != nil {
		return nil, fmt.Errorf("cannot list nftables chains: %w", err)
	}
	for _, ch := range all {
		if ch.Table.Name == tableName {
			continue
		}
		rules, err := c.GetRules(ch.Table, ch)
		if err != nil {
			return nil, fmt.Errorf("cannot list the rules of nftables chain %s: %w", ch.Name, err)
		}
		for _, r := range rules {
			if namesService(c, r) {
				found = append(found, fmt.Sprintf("%s %s %s", family(ch.Table.Family), ch.Table.Name, ch.Name))
				break
			}
		}
	}
	return found, nil
}

func namesService(c *nftables.Conn, r *nftables.Rule) bool {
	for _, e := range r.Exprs {
		switch e := e.(type) {
		case *expr.Cmp:
			if bytes.Equal(e.Data, service) {
				return true
			}
		case *expr.Immediate:
			if bytes.Equal(e.Data, service) {
				return true
			}
		case *expr.Lookup:
			elems, _ := c.GetSetElements(&nftables.Set{Table: r.Table, Name: e.SetName})
			for _, el := range elems {
				if bytes.Contains(el.Key, service) || bytes.Contains(el.Val, service) {
					return true
				}
			}
		}
	}
	return false
}

func family(f nftables.TableFamily) string {
	switch f {
	case nftables.TableFamilyINet:
		return "inet"
	case nftables.TableFamilyIPv4:
		return "ip"
	case nftables.TableFamilyBridge:
		return "bridge"
	case nftables.TableFamilyARP:
		return "arp"
	case nftables.TableFamilyNetdev:
		return "netdev"
	}
	return fmt.Sprintf("family %d", f)
}
