package identity

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	// tableName is that of our tables, one in each of three families.
	tableName = "belay_identity"
	// guestChain begins the names of chains that set a mark, which follows in
	// hexadecimal, of what is not too much.
	guestChain = "guest-"
	// elements is how many of a set go into a message, which ends at 64 KiB.
	elements = 500
	// connects and connectsAtOnce are how many connections a guest may open by a tap,
	// for long and at once. What is more is dropped, and TCP tries again.
	connects       = 50 // a second
	connectsAtOnce = 100
	// netlinkBuffer holds a transaction of some thousand guests, and its
	// acknowledgements.
	netlinkBuffer = 32 << 20
)

// priority is after what libvirt's nwfilter does (-300, -200), and before
// br_netfilter takes packets to the IP hooks (0).
var priority = nftables.ChainPriorityRef(-100)

var (
	bridgeTable = &nftables.Table{Name: tableName, Family: nftables.TableFamilyBridge}
	ipTable     = &nftables.Table{Name: tableName, Family: nftables.TableFamilyIPv4}
	arpTable    = &nftables.Table{Name: tableName, Family: nftables.TableFamilyARP}
	tables      = []*nftables.Table{bridgeTable, ipTable, arpTable}

	prerouting = base(bridgeTable, "prerouting", nftables.ChainHookPrerouting)
	forward    = base(bridgeTable, "forward", nftables.ChainHookForward)
	output     = base(bridgeTable, "output", nftables.ChainHookOutput)
	asks       = &nftables.Chain{Table: bridgeTable, Name: "asks"}
	served     = &nftables.Chain{Table: bridgeTable, Name: "served"}
	input      = base(ipTable, "input", nftables.ChainHookInput)
	arpOutput  = base(arpTable, "output", nftables.ChainHookRef(1)) // NF_ARP_OUT of linux/netfilter_arp.h
	chains     = []*nftables.Chain{prerouting, forward, output, asks, served, input, arpOutput}
)

// Sets are numbered here: the library would count in a variable that all
// connections share.
var (
	setTaps    = set(1, bridgeTable, "taps", nftables.TypeIFIndex)                               // of known guests
	setMACs    = set(2, bridgeTable, "macs", nftables.TypeIFIndex, nftables.TypeEtherAddr)       // tap, its guest's MAC address
	setAddrs   = set(3, bridgeTable, "addresses", nftables.TypeIFIndex, nftables.TypeIPAddr)     // tap, an address of its guest
	setLoose   = set(4, bridgeTable, "any_address", nftables.TypeIFIndex)                        // taps of guests with unknown addresses
	setReplies = set(5, bridgeTable, "replies", nftables.TypeMark, nftables.TypeIFIndex)         // mark, the only tap to send it to
	mapGuests  = dict(6, bridgeTable, "guests", nftables.TypeIFIndex, nftables.TypeVerdict)      // tap, chain that sets its mark
	mapHost    = dict(7, bridgeTable, "host_macs", nftables.TypeIFIndex, nftables.TypeEtherAddr) // tap, its bridge's MAC address
	setMarks   = set(8, ipTable, "marks", nftables.TypeMark, nftables.TypeMark)                  // each mark twice
	setBridges = set(9, ipTable, "bridges", nftables.TypeIFIndex)
	setBare    = set(10, arpTable, "bare", nftables.TypeIFIndex) // bridges without an address
	sets       = []*nftables.Set{setTaps, setMACs, setAddrs, setLoose, setReplies, mapGuests, mapHost, setMarks, setBridges, setBare}
)

func base(t *nftables.Table, name string, hook *nftables.ChainHook) *nftables.Chain {
	return &nftables.Chain{Table: t, Name: name, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: priority}
}

func set(id uint32, t *nftables.Table, name string, key ...nftables.SetDatatype) *nftables.Set {
	s := &nftables.Set{ID: id, Table: t, Name: name, KeyType: key[0], KeyByteOrder: binaryutil.NativeEndian}
	if len(key) > 1 {
		s.KeyType, s.Concatenation = nftables.MustConcatSetType(key...), true
	}
	return s
}

func dict(id uint32, t *nftables.Table, name string, key, data nftables.SetDatatype) *nftables.Set {
	s := set(id, t, name, key)
	s.IsMap, s.DataType = true, data
	return s
}

// rule is one that never changes: what does is in sets.
type rule struct {
	chain *nftables.Chain
	match match
}

// rules are those of a mask of marks.
//
//	prerouting ─► asks ─► served ─► guest-MARK
func rules(mask uint32) []rule {
	iif, oif := load(expr.MetaKeyIIF, reg1), load(expr.MetaKeyOIF, reg1)
	ip, arp := protocol(unix.ETH_P_IP), all(protocol(unix.ETH_P_ARP), arpTypes.is(etherIPv4))
	drop, accept := verdict(expr.VerdictDrop), verdict(expr.VerdictAccept)
	return []rule{
		// No guest is 169.254.169.254.
		{prerouting, all(iif, in(setTaps), ip, ipSrc.is(service), drop)},
		{prerouting, all(iif, in(setTaps), arp, arpSrc.is(service), drop)},
		{prerouting, all(ip, ipDst.is(service), jump(asks))},
		{prerouting, all(arp, arpDst.is(service), jump(asks))},

		// Whoever sends it and whatever others have marked it with: a frame has
		// no mark of ours until it has one from here.
		{asks, setMark(0, mask)},
		{asks, all(iif, notIn(setTaps), verdict(expr.VerdictReturn))},
		{asks, all(tagType.is(be16(unix.ETH_P_8021Q)), tagVLAN.has(be16(0x0fff)), drop)},
		{asks, all(tagType.is(be16(unix.ETH_P_8021AD)), drop)},
		{asks, all(iif, etherSrc.load(reg2), notIn(setMACs), drop)},
		{asks, all(ip, ipFragment.has(be16(0x3fff)), drop)}, // more fragments, or an offset
		{asks, all(ip, iif, notIn(setLoose), iif, ipSrc.load(reg2), notIn(setAddrs), drop)},
		{asks, all(ip, tcp(tcpDstPort), jump(served))},
		{asks, all(arp, iif, arpSrcMAC.load(reg2), notIn(setMACs), drop)},
		{asks, all(arp, arpSrc.isNot(make([]byte, 4)), iif, notIn(setLoose), iif, arpSrc.load(reg2), notIn(setAddrs), drop)},
		{asks, all(arp, jump(served))},
		{asks, drop},

		// It is for the host, also if the guest has sent it to its gateway or to
		// everybody, and nobody else gets it.
		{served, all(iif, verdictOf(mapGuests))},
		{served, setHost()},
		{served, all(iif, mapped(mapHost), etherDst.set())},
		{served, accept},

		// No other port is 169.254.169.254 for our guests.
		{forward, all(oif, in(setTaps), ip, ipSrc.is(service), drop)},
		{forward, all(oif, in(setTaps), arp, arpSrc.is(service), drop)},

		// A reply goes to the tap that the question came from, whatever the
		// guests made the host believe about who has which address.
		{output, all(ip, ipSrc.is(service), tcp(tcpSrcPort),
			load(expr.MetaKeyMARK, reg1), and(reg1, native(mask)), compare(expr.CmpOpNeq, native(0)),
			load(expr.MetaKeyOIF, reg2), notIn(setReplies), drop)},

		// A mark is one from above only if the packet has come by a bridge: who may
		// set marks on the host is no guest.
		{input, all(ipDst.is(service), tcp(tcpDstPort),
			load(expr.MetaKeyMARK, reg1), and(reg1, native(mask)), compare(expr.CmpOpNeq, native(0)),
			iif, notIn(setBridges), drop)},

		// Nobody adds to another's connection.
		{input, all(ipDst.is(service), tcp(tcpDstPort),
			match{&expr.Socket{Key: expr.SocketKeyMark, Register: reg1}}, and(reg1, native(mask)), compare(expr.CmpOpNeq, native(0)),
			load(expr.MetaKeyMARK, reg2), and(reg2, native(mask)), notIn(setMarks), drop)},

		// Where the host has no address, it asks for guests' by ours, and not by
		// one that it has elsewhere.
		{arpOutput, all(oif, in(setBare), arpOp.is(arpRequest), immediate(service), arpSrc.set())},
	}
}

// nft opens a connection to nftables in the gate's network namespace.
func (g *Gate) nft() (*nftables.Conn, error) {
	ns := max(int(g.away()), 0) // 0: the thread's own
	return nftables.New(nftables.WithNetNSFd(ns), nftables.WithSockOptions(func(c *netlink.Conn) error {
		return errors.Join(c.SetWriteBuffer(netlinkBuffer), c.SetReadBuffer(netlinkBuffer))
	}))
}

// guestChains are the chains that set marks now.
func guestChains(c *nftables.Conn) ([]*nftables.Chain, error) {
	there, err := c.ListChainsOfTableFamily(bridgeTable.Family)
	if err != nil {
		return nil, fmt.Errorf("cannot list nftables chains: %w", err)
	}
	return slices.DeleteFunc(there, func(c *nftables.Chain) bool {
		return c.Table.Name != tableName || !strings.HasPrefix(c.Name, guestChain)
	}), nil
}

// markOf is what a guest's chain sets.
func markOf(chain string) (uint32, error) {
	mark, err := strconv.ParseUint(strings.TrimPrefix(chain, guestChain), 16, 32)
	return uint32(mark), err
}

// program makes the kernel's rules be those for taps, in one transaction.
// Chains with hooks are never taken away: while one is replaced by another a
// frame could pass between them.
func (g *Gate) program(taps []tap, bridges map[int]bridge) error {
	c, err := g.nft()
	if err != nil {
		return fmt.Errorf("cannot talk to nftables: %w", err)
	}
	old, err := guestChains(c)
	if err != nil {
		return err
	}
	for _, t := range tables {
		c.AddTable(t)
	}
	for _, ch := range chains {
		c.AddChain(ch)
		c.FlushChain(ch)
	}
	for _, s := range sets {
		if err := c.AddSet(s, nil); err != nil {
			return fmt.Errorf("cannot write nftables set %s: %w", s.Name, err)
		}
		c.FlushSet(s)
	}
	for _, ch := range old {
		c.FlushChain(ch)
		c.DelChain(ch)
	}
	for _, t := range taps {
		ch := c.AddChain(&nftables.Chain{Table: bridgeTable, Name: fmt.Sprintf("%s%08x", guestChain, t.mark)})
		c.AddRule(&nftables.Rule{Table: bridgeTable, Chain: ch, Exprs: all(protocol(unix.ETH_P_IP), tcp(tcpDstPort),
			tcpFlags.has(tcpSYN), faster(connects, connectsAtOnce), verdict(expr.VerdictDrop))})
		c.AddRule(&nftables.Rule{Table: bridgeTable, Chain: ch, Exprs: setMark(t.mark, g.marks.mask)})
	}
	for s, of := range contents(taps, bridges) {
		for part := range slices.Chunk(of, elements) {
			if err := c.SetAddElements(s, part); err != nil {
				return fmt.Errorf("cannot write nftables set %s: %w", s.Name, err)
			}
		}
	}
	for _, r := range rules(g.marks.mask) {
		c.AddRule(&nftables.Rule{Table: r.chain.Table, Chain: r.chain, Exprs: r.match})
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("cannot write nftables rules: %w", err)
	}
	return nil
}

// contents is what is in the sets.
func contents(taps []tap, bridges map[int]bridge) map[*nftables.Set][]nftables.SetElement {
	of := make(map[*nftables.Set][]nftables.SetElement)
	add := func(s *nftables.Set, key []byte) { of[s] = append(of[s], nftables.SetElement{Key: key}) }
	for _, t := range taps {
		index := uint32(t.Ifindex)
		add(setTaps, native(index))
		add(setMACs, pair(index, t.MAC))
		add(setReplies, pair(t.mark, native(index)))
		add(setMarks, pair(t.mark, native(t.mark)))
		ours := t.ipv4()
		for _, a := range ours {
			add(setAddrs, pair(index, a.AsSlice()))
		}
		if len(ours) == 0 {
			add(setLoose, native(index))
		}
		of[mapGuests] = append(of[mapGuests], nftables.SetElement{Key: native(index),
			VerdictData: &expr.Verdict{Kind: expr.VerdictJump, Chain: fmt.Sprintf("%s%08x", guestChain, t.mark)}})
		of[mapHost] = append(of[mapHost], nftables.SetElement{Key: native(index), Val: bridges[t.bridge].mac})
	}
	for index, b := range bridges {
		add(setBridges, native(uint32(index)))
		if b.bare {
			add(setBare, native(uint32(index)))
		}
	}
	return of
}

// unprogram takes our tables away.
func (g *Gate) unprogram() error {
	c, err := g.nft()
	if err != nil {
		return fmt.Errorf("cannot talk to nftables: %w", err)
	}
	for _, t := range tables {
		c.AddTable(t) // a table that is not there cannot be deleted
		c.DelTable(t)
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("cannot delete nftables tables %s: %w", tableName, err)
	}
	return nil
}
