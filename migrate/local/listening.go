package local

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// listening are the TCP addresses on which somebody listens. The kernel is asked for those
// alone: files of procfs have all connections, and take some 20 ms to read where there is
// much memory, since the kernel's table of them is as large.
func (h *Host) listening() []netip.AddrPort {
	if h.root == "" {
		if all, err := listeners(); err == nil {
			return all
		}
	}
	return h.listeningByFile()
}

const (
	tcpListen    = 10 // TCP_LISTEN
	diagReqSize  = 56 // struct inet_diag_req_v2
	diagMsgSize  = 72 // struct inet_diag_msg
	diagIDOffset = 4  // of struct inet_diag_sockid in both its family's messages
)

// diagRequest is a struct inet_diag_req_v2 for listening TCP sockets of one family.
type diagRequest uint8

func (f diagRequest) Len() int { return diagReqSize }

func (f diagRequest) Serialize() []byte {
	b := make([]byte, diagReqSize)
	b[0], b[1] = byte(f), unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(b[4:], 1<<tcpListen)
	return b
}

// listeners asks the kernel.
//
// Source: sock_diag(7), SOCK_DIAG_BY_FAMILY.
func listeners() (all []netip.AddrPort, err error) {
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		req := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
		req.AddData(diagRequest(family))
		msgs, err := req.Execute(unix.NETLINK_INET_DIAG, nl.SOCK_DIAG_BY_FAMILY)
		if err != nil {
			return nil, fmt.Errorf("ask for listening sockets: %w", err)
		}
		for _, m := range msgs {
			if len(m) < diagMsgSize {
				return nil, fmt.Errorf("the kernel tells of a socket in %d bytes", len(m))
			}
			all = append(all, listener(m))
		}
	}
	return all, nil
}

// listener reads a struct inet_diag_msg.
func listener(m []byte) netip.AddrPort {
	port, addr := binary.BigEndian.Uint16(m[diagIDOffset:]), m[diagIDOffset+4:]
	if m[0] == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(addr[:4])), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom16([16]byte(addr[:16])).Unmap(), port)
}

// listeningByFile reads the same from files.
//
// Sources: /proc/net/tcp, /proc/net/tcp6.
func (h *Host) listeningByFile() (all []netip.AddrPort) {
	const listen = "0A" // TCP_LISTEN
	for _, file := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		h.lines(file, func(line string) {
			f := strings.Fields(line)
			if len(f) < 4 || f[3] != listen {
				return
			}
			if at, ok := hexAddress(f[1]); ok {
				all = append(all, at)
			}
		})
	}
	return all
}

// hexAddress reads the kernel's form of an address: 32-bit words in the order of
// the machine's bytes, and the port.
func hexAddress(text string) (netip.AddrPort, bool) {
	host, port, _ := strings.Cut(text, ":")
	b, err := hex.DecodeString(host)
	n, errPort := strconv.ParseUint(port, 16, 16)
	if err != nil || errPort != nil || len(b)%4 != 0 {
		return netip.AddrPort{}, false
	}
	for i := 0; i < len(b); i += 4 {
		binary.BigEndian.PutUint32(b[i:], binary.NativeEndian.Uint32(b[i:]))
	}
	addr, ok := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(addr.Unmap(), uint16(n)), ok
}
