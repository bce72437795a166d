package identity

import (
	"encoding/binary"
	"net"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"belay/notify"
)

// match is a part of a rule: what it looks at, or what it does.
type match []expr.Any

// Registers of four bytes (NFT_REG32_00 and on): what is compared begins in the
// first, and the second part of a pair is in the second.
const (
	reg1 = unix.NFT_REG32_00
	reg2 = unix.NFT_REG32_01
)

// Where headers have what is looked at: bytes from the start of the Ethernet,
// IPv4, ARP (for IPv4 over Ethernet) and TCP headers.
var (
	etherDst = field{expr.PayloadBaseLLHeader, 0, 6}
	etherSrc = field{expr.PayloadBaseLLHeader, 6, 6}
	tagType  = field{expr.PayloadBaseLLHeader, 12, 2}
	tagVLAN  = field{expr.PayloadBaseLLHeader, 14, 2}

	ipFragment = field{expr.PayloadBaseNetworkHeader, 6, 2}
	ipSrc      = field{expr.PayloadBaseNetworkHeader, 12, 4}
	ipDst      = field{expr.PayloadBaseNetworkHeader, 16, 4}

	arpTypes  = field{expr.PayloadBaseNetworkHeader, 0, 6} // Ethernet, IPv4, and their lengths
	arpOp     = field{expr.PayloadBaseNetworkHeader, 6, 2}
	arpSrcMAC = field{expr.PayloadBaseNetworkHeader, 8, 6}
	arpSrc    = field{expr.PayloadBaseNetworkHeader, 14, 4}
	arpDst    = field{expr.PayloadBaseNetworkHeader, 24, 4}

	tcpSrcPort = field{expr.PayloadBaseTransportHeader, 0, 2}
	tcpDstPort = field{expr.PayloadBaseTransportHeader, 2, 2}
	tcpFlags   = field{expr.PayloadBaseTransportHeader, 13, 1}
)

var (
	service    = net.ParseIP(notify.Address).To4()
	etherIPv4  = []byte{0, 1, 8, 0, 6, 4}
	httpPort   = be16(80)
	arpRequest = be16(1)
	tcpSYN     = []byte{2}
)

type field struct {
	base        expr.PayloadBase
	offset, len uint32
}

func (f field) load(reg uint32) match {
	return match{&expr.Payload{DestRegister: reg, Base: f.base, Offset: f.offset, Len: f.len}}
}

// set writes what is in reg1. It is not for what a checksum covers.
func (f field) set() match {
	return match{&expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: reg1, Base: f.base, Offset: f.offset, Len: f.len}}
}

func (f field) is(v []byte) match    { return all(f.load(reg1), compare(expr.CmpOpEq, v)) }
func (f field) isNot(v []byte) match { return all(f.load(reg1), compare(expr.CmpOpNeq, v)) }

// has matches where some of the bits are set.
func (f field) has(bits []byte) match {
	return all(f.load(reg1), and(reg1, bits), compare(expr.CmpOpNeq, make([]byte, len(bits))))
}

func load(key expr.MetaKey, reg uint32) match { return match{&expr.Meta{Key: key, Register: reg}} }

func metaIs(key expr.MetaKey, v []byte) match {
	return all(load(key, reg1), compare(expr.CmpOpEq, v))
}

// protocol matches an EtherType, that inside of a VLAN tag where there is one.
func protocol(etherType uint16) match { return metaIs(expr.MetaKeyPROTOCOL, be16(etherType)) }

func tcp(port field) match {
	return all(metaIs(expr.MetaKeyL4PROTO, []byte{unix.IPPROTO_TCP}), port.is(httpPort))
}

// faster matches what comes faster than so often a second, and so often at once.
func faster(perSecond uint64, burst uint32) match {
	return match{&expr.Limit{Type: expr.LimitTypePkts, Rate: perSecond, Unit: expr.LimitTimeSecond, Burst: burst, Over: true}}
}

func compare(op expr.CmpOp, v []byte) match {
	return match{&expr.Cmp{Op: op, Register: reg1, Data: v}}
}

func and(reg uint32, mask []byte) match {
	return match{&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: uint32(len(mask)), Mask: mask, Xor: make([]byte, len(mask))}}
}

// in matches where what is in the registers is in a set, notIn where it is not.
func in(s *nftables.Set) match {
	return match{&expr.Lookup{SourceRegister: reg1, SetName: s.Name, SetID: s.ID}}
}

func notIn(s *nftables.Set) match {
	return match{&expr.Lookup{SourceRegister: reg1, SetName: s.Name, SetID: s.ID, Invert: true}}
}

// mapped replaces what is in reg1 by what a map has for it.
func mapped(s *nftables.Set) match {
	return match{&expr.Lookup{SourceRegister: reg1, DestRegister: reg1, IsDestRegSet: true, SetName: s.Name, SetID: s.ID}}
}

// verdictOf goes where a map says.
func verdictOf(s *nftables.Set) match {
	return match{&expr.Lookup{SourceRegister: reg1, DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetName: s.Name, SetID: s.ID}}
}

// setMark has the bits of mask be those of mark, and leaves the others.
func setMark(mark, mask uint32) match {
	return match{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1},
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: native(^mask), Xor: native(mark)},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1, SourceRegister: true},
	}
}

// setHost has the frame be one that is for the host itself (PACKET_HOST).
func setHost() match {
	return match{
		&expr.Immediate{Register: reg1, Data: []byte{unix.PACKET_HOST}},
		&expr.Meta{Key: expr.MetaKeyPKTTYPE, Register: reg1, SourceRegister: true},
	}
}

func immediate(v []byte) match { return match{&expr.Immediate{Register: reg1, Data: v}} }

func verdict(kind expr.VerdictKind) match { return match{&expr.Verdict{Kind: kind}} }

func jump(c *nftables.Chain) match {
	return match{&expr.Verdict{Kind: expr.VerdictJump, Chain: c.Name}}
}

func all(parts ...match) (m match) {
	for _, p := range parts {
		m = append(m, p...)
	}
	return m
}

// be16 is a number as headers have it, native as the kernel keeps its own.
func be16(v uint16) []byte   { return binary.BigEndian.AppendUint16(nil, v) }
func native(v uint32) []byte { return binaryutil.NativeEndian.PutUint32(v) }

// pair is the key of a set of two things, each of which begins a new register.
func pair(a uint32, b []byte) []byte {
	key := append(native(a), b...)
	return append(key, make([]byte, (4-len(b)%4)%4)...)
}
