package guest_test

import (
	"context"
	"net"
	"testing"
	"time"

	"belay/vmtests/guest"
	"belay/vmtests/lab"
	"belay/vmtests/probe"
)

// spoilt is how many datagrams a relay treats before it passes on all it gets.
const spoilt = 1000

// relay stands between a guest and the observer. Of each ten of the first
// spoilt datagrams it drops the first, sends the fourth twice, and sends the
// seventh after the eighth.
func relay(in, out *net.UDPConn) error {
	buf, held := make([]byte, 2048), []byte(nil)
	for n := 0; ; n++ {
		size, err := in.Read(buf)
		if err != nil {
			return err
		}
		send := [][]byte{buf[:size]}
		if n < spoilt {
			switch n % 10 {
			case 0:
				send = nil
			case 3:
				send = append(send, buf[:size])
			case 6:
				send, held = nil, append([]byte(nil), buf[:size]...)
			case 7:
				send = append(send, held)
			}
		}
		for _, b := range send {
			if _, err := out.Write(b); err != nil {
				return err
			}
		}
	}
}

// checkPath has a relay do known harm to the train; it must be counted to the
// last datagram.
func (w *world) checkPath(t *testing.T, ctx context.Context, c *guest.Control, name string) {
	var in, out *net.UDPConn
	err := w.InSwitch(func() (err error) {
		addr := &net.UDPAddr{IP: lab.SwitchAddr().AsSlice(), Port: beatPort + 1}
		if in, err = net.ListenUDP("udp4", addr); err == nil {
			out, err = net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(w.obs.Addr()))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- relay(in, out) }()
	defer func() {
		in.Close()
		<-ended
		out.Close()
	}()

	m := w.obs.Mark()
	if _, err := c.Heartbeat(ctx, probe.HeartbeatSettings{To: in.LocalAddr().String()}); err != nil {
		t.Fatal(err)
	}
	w.await(t, ctx, name, spoilt+200)
	r := w.obs.Since(m, name)
	t.Logf("lost %d, duplicated %d, reordered %d of %d", r.Lost, r.Duplicated, r.Reordered, r.Received)
	const each = spoilt / 10
	if r.Lost != each || r.Duplicated != each || r.Reordered != each || r.ReceiverDrops != 0 {
		t.Errorf("lost %d, duplicated %d, reordered %d; want %d each", r.Lost, r.Duplicated, r.Reordered, each)
	}
	if r.Pause() > time.Second {
		t.Errorf("pause of %v", r.Pause())
	}
	if _, err := c.Heartbeat(ctx, probe.HeartbeatSettings{To: w.obs.Addr().String()}); err != nil {
		t.Fatal(err)
	}
}
