package lab_test

import (
	"fmt"
	"net"
	"testing"
	"time"

	"belay/vmtests/lab"
)

// echo is a socket of the switch that answers with what it gets.
func echo(t *testing.T, l *lab.Lab) net.PacketConn {
	t.Helper()
	var conn net.PacketConn
	err := l.InSwitch(func() (err error) {
		conn, err = net.ListenPacket("udp", lab.SwitchAddr().String()+":0")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	go func() {
		buf := make([]byte, 64)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = conn.WriteTo(buf[:n], from)
		}
	}()
	return conn
}

func TestLink(t *testing.T) {
	t.Parallel()
	l := up(t, lab.Config{Hosts: 2})
	a, b := l.Hosts[0], l.Hosts[1]
	server := echo(t, l)
	var client net.Conn
	if err := a.InNet(func() (err error) { client, err = net.Dial("udp", server.LocalAddr().String()); return err }); err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	asked := 0 // datagrams so far: an answer may come when others are asked for
	// ask sends n datagrams, a millisecond apart, and returns how many are
	// answered, and the least time that took.
	ask := func(n int, wait time.Duration) (answers int, least time.Duration) {
		t.Helper()
		sent := make([]time.Time, n)
		first := asked
		asked += n
		least = time.Hour
		done := make(chan struct{})
		client.SetReadDeadline(time.Time{})
		go func() {
			defer close(done)
			buf := make([]byte, 64)
			for answers < n {
				m, err := client.Read(buf)
				if err != nil {
					return
				}
				var i int
				if _, err := fmt.Sscanf(string(buf[:m]), "%d", &i); err == nil && i >= first {
					answers, least = answers+1, min(least, time.Since(sent[i-first]))
				}
			}
		}()
		for i := range n {
			sent[i] = time.Now()
			_, _ = fmt.Fprintf(client, "%d", first+i)
			time.Sleep(time.Millisecond)
		}
		client.SetReadDeadline(time.Now().Add(wait))
		<-done
		return answers, least
	}
	answered := func() error {
		if n, _ := ask(1, 100*time.Millisecond); n != 1 {
			return fmt.Errorf("no answer")
		}
		return nil
	}

	link, err := a.Emulate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	within(t, time.Minute, answered)
	if n, least := ask(500, time.Minute); n != 500 || least > 50*time.Millisecond {
		t.Errorf("a perfect link: %d of 500 answers, the first after %v", n, least)
	}
	link.Delay(50 * time.Millisecond)
	n, least := ask(100, time.Minute)
	if n != 100 || least < 100*time.Millisecond || least > 180*time.Millisecond {
		t.Errorf("50 ms each way: %d of 100 answers, the first after %v", n, least)
	}
	link.Perfect()
	link.Loss(10)
	if n, _ := ask(1000, 2*time.Second); n < 700 || n > 900 { // 81 %, and more than 7 sigma
		t.Errorf("10 %% lost each way: %d of 1000 answers", n)
	}
	link.Loss(100)
	if n, _ := ask(50, 200*time.Millisecond); n != 0 {
		t.Errorf("%d answers over a link that loses all", n)
	}
	link.Perfect()

	var listener net.Listener
	if err := l.InSwitch(func() (err error) {
		listener, err = net.Listen("tcp", lab.SwitchAddr().String()+":0")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	const size = 64 << 20
	took := transfer(t, a, listener, size)
	t.Logf("%d MiB in %v: %.0f MB/s", size>>20, took, size/1e6/took.Seconds())
	if took > 30*time.Second {
		t.Error("too slow to carry a guest's memory")
	}

	if err := a.SetLink(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if n, _ := ask(20, 100*time.Millisecond); n != 0 {
		t.Errorf("%d answers over a link that is cut", n)
	}
	if err := a.SetLink(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	within(t, time.Minute, answered)
	for range 2 {
		if err := link.Close(); err != nil {
			t.Fatal(err)
		}
	}
	within(t, time.Minute, answered)

	// One that is left open goes with its lab.
	if _, err := b.Emulate(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !t.Failed() { // else its logs are wanted
		if err := l.Down(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantNothingLeft(t, l)
	}
}
