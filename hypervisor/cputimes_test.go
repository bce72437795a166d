package hypervisor

import (
	"encoding/binary"
	"testing"
	"time"
)

// packetOf is a packet of the monitor's event, without its length.
func packetOf(program, proc uint32, name string) []byte {
	var p []byte
	word := func(v uint32) { p = binary.BigEndian.AppendUint32(p, v) }
	text := func(s string) {
		word(uint32(len(s)))
		p = append(p, s...)
		for len(p)%4 != 0 {
			p = append(p, 0)
		}
	}
	for _, v := range []uint32{program, 1, proc, 2, 0, 0, 7} {
		word(v)
	}
	text("web-1")
	p = append(p, make([]byte, 16)...)
	word(3)
	text(name)
	word(0)
	word(1_763_800_000)
	word(123_456)
	word(0) // no details
	return p
}

func TestMonitorEvent(t *testing.T) {
	t.Parallel()
	whole := packetOf(qemuProgram, procMonitorEvent, "RESUME")
	e, ok := parseMonitorEvent(whole)
	if want := time.Unix(1_763_800_000, 123_456_000); !ok || e.name != "RESUME" || !e.at.Equal(want) {
		t.Errorf("%+v, %t", e, ok)
	}
	for n := range len(whole) - 4 {
		if e, ok := parseMonitorEvent(whole[:n]); ok {
			t.Fatalf("the first %d bytes are %+v", n, e)
		}
	}
	for _, other := range [][]byte{packetOf(0x20008086, procMonitorEvent, "STOP"), packetOf(qemuProgram, 7, "STOP")} {
		if e, ok := parseMonitorEvent(other); ok {
			t.Errorf("another packet is %+v", e)
		}
	}
	huge := packetOf(qemuProgram, procMonitorEvent, "STOP")
	binary.BigEndian.PutUint32(huge[28:], 1<<31+5) // the name's length
	if e, ok := parseMonitorEvent(huge); ok {
		t.Errorf("a packet that lies is %+v", e)
	}
}

func FuzzMonitorEvent(f *testing.F) {
	f.Add(packetOf(qemuProgram, procMonitorEvent, "STOP"))
	f.Fuzz(func(_ *testing.T, packet []byte) { parseMonitorEvent(packet) })
}
