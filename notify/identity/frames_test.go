package identity

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
)

var broadcast = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// segment is a TCP segment in a frame, to 169.254.169.254:80 if nothing else is said.
type segment struct {
	dst, src net.HardwareAddr
	tags     []byte // between the addresses and the EtherType
	from     netip.Addr
	dest     netip.Addr
	port     uint16 // that it is from, which tells probes apart
	to       uint16 // default 80
	frag     uint16 // flags and offset of a fragment
	seq, ack uint32
	flags    byte // default SYN
	data     string
}

const flagSYN, flagPSH, flagACK = 2, 8, 16

func (s segment) frame() []byte {
	if s.flags == 0 {
		s.flags = flagSYN
	}
	if s.to == 0 {
		s.to = 80
	}
	if !s.dest.IsValid() {
		s.dest = serviceAddr
	}
	from, dest := s.from.AsSlice(), s.dest.AsSlice()
	tcp := binary.BigEndian.AppendUint16(nil, s.port)
	tcp = binary.BigEndian.AppendUint16(tcp, s.to)
	tcp = binary.BigEndian.AppendUint32(tcp, s.seq)
	tcp = binary.BigEndian.AppendUint32(tcp, s.ack)
	tcp = append(tcp, 5<<4, s.flags, 0xff, 0xff, 0, 0, 0, 0)
	tcp = append(tcp, s.data...)
	pseudo := bytes.Join([][]byte{from, dest, {0, 6}, be16(uint16(len(tcp)))}, nil)
	binary.BigEndian.PutUint16(tcp[16:], checksum(append(pseudo, tcp...)))

	ip := append([]byte{0x45, 0}, be16(uint16(20+len(tcp)))...)
	ip = append(ip, 0, 1, byte(s.frag>>8), byte(s.frag), 64, 6, 0, 0)
	ip = append(append(ip, from...), dest...)
	binary.BigEndian.PutUint16(ip[10:], checksum(ip))
	return bytes.Join([][]byte{s.dst, s.src, s.tags, {8, 0}, ip, tcp}, nil)
}

func checksum(b []byte) uint16 {
	if len(b)%2 != 0 {
		b = append(b, 0)
	}
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// isFromPort says that a frame has a segment from a port to the service.
func isFromPort(f []byte, port uint16) bool {
	return len(f) >= 54 && f[12] == 8 && f[13] == 0 && bytes.Equal(f[30:34], service) && binary.BigEndian.Uint16(f[34:]) == port
}

// synAck is the port that a frame accepts a connection from, 0 if it does not.
func synAck(f []byte) uint16 {
	if len(f) < 54 || f[12] != 8 || f[13] != 0 || f[23] != 6 || !bytes.Equal(f[26:30], service) || f[47]&(flagSYN|flagACK) != flagSYN|flagACK {
		return 0
	}
	return binary.BigEndian.Uint16(f[36:])
}

// isSYN tells frames of TCP that open a connection.
func isSYN(f []byte) bool {
	return len(f) >= 54 && f[12] == 8 && f[13] == 0 && f[23] == 6 && f[47]&(flagSYN|flagACK) == flagSYN
}

// isFrom tells frames of IP by their source.
func isFrom(f []byte, a netip.Addr) bool {
	return len(f) >= 34 && f[12] == 8 && f[13] == 0 && bytes.Equal(f[26:30], a.AsSlice())
}

// arp is a frame of ARP.
type arp struct {
	dst, src net.HardwareAddr
	op       byte // 1 asks, 2 answers
	mac      net.HardwareAddr
	from, to netip.Addr
}

func (a arp) frame() []byte {
	return bytes.Join([][]byte{a.dst, a.src, {8, 6, 0, 1, 8, 0, 6, 4, 0, a.op}, a.mac, a.from.AsSlice(), make([]byte, 6), a.to.AsSlice()}, nil)
}

// arpOf takes a frame apart.
func arpOf(f []byte) (op byte, from, to netip.Addr, ok bool) {
	if len(f) < 42 || f[12] != 8 || f[13] != 6 {
		return 0, from, to, false
	}
	return f[21], netip.AddrFrom4([4]byte(f[28:32])), netip.AddrFrom4([4]byte(f[38:42])), true
}
