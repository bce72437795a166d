package lockd

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// daemon answers on a unix socket: answer is given a call's procedure and
// arguments, and gives the status.
func daemon(t *testing.T, answer func(c net.Conn, header, args []byte)) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = c.Close() }()
				for {
					header := make([]byte, headerSize)
					if _, err := io.ReadFull(c, header); err != nil {
						return
					}
					args := make([]byte, binary.BigEndian.Uint32(header)-headerSize)
					if _, err := io.ReadFull(c, args); err != nil {
						return
					}
					answer(c, header, args)
				}
			}()
		}
	}()
	return socket
}

func reply(c net.Conn, header []byte, status uint32) {
	out := slices.Clone(header)
	binary.BigEndian.PutUint32(out, headerSize)
	binary.BigEndian.PutUint32(out[16:], typeReply)
	binary.BigEndian.PutUint32(out[24:], status)
	_, _ = c.Write(out)
}

func TestRelease(t *testing.T) {
	owner := Owner{UUID: [16]byte{1, 15: 16}, Name: "web-1", ID: 7, PID: 4711}
	held := map[string]bool{"/srv/a": true, "/srv/long-name": true}
	pid := uint32(0)
	socket := daemon(t, func(c net.Conn, header, args []byte) {
		status := uint32(1)
		switch binary.BigEndian.Uint32(header[12:]) {
		case register: // uuid, name, id, pid, flags
			if len(args) == 16+4+8+12 && args[0] == 1 && args[15] == 16 && string(args[20:25]) == "web-1" && args[31] == 7 {
				pid, status = binary.BigEndian.Uint32(args[32:]), 0
			}
		case release: // lockspace, name, flags
			name := string(args[8 : 8+binary.BigEndian.Uint32(args[4:])])
			if pid == 4711 && len(args)%4 == 0 && held[name] {
				status = 0
				delete(held, name)
			}
		}
		reply(c, header, status)
	})
	for _, want := range []int{2, 0} {
		n, err := Release(t.Context(), socket, owner, []string{"/srv/none", "/srv/a", "/srv/long-name"})
		if err != nil || n != want {
			t.Errorf("released %d, %v; want %d", n, err, want)
		}
	}
}

func TestStrangeDaemons(t *testing.T) {
	for name, answer := range map[string]func(c net.Conn, header, args []byte){
		"hangs up":      func(c net.Conn, _, _ []byte) { _ = c.Close() },
		"says nothing":  func(net.Conn, []byte, []byte) {},
		"refuses":       func(c net.Conn, header, _ []byte) { reply(c, header, 1) },
		"too short":     func(c net.Conn, _, _ []byte) { _, _ = c.Write(make([]byte, headerSize)) },
		"too long":      func(c net.Conn, _, _ []byte) { _, _ = c.Write([]byte{0xFF, 30: 0}) },
		"other serial":  func(c net.Conn, header, _ []byte) { header[23]++; reply(c, header, 0) },
		"other program": func(c net.Conn, header, _ []byte) { header[7]++; reply(c, header, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			n, err := Release(ctx, daemon(t, answer), Owner{PID: 1}, []string{"/srv/a"})
			if err == nil || n != 0 {
				t.Errorf("released %d, %v", n, err)
			}
			if errors.Is(err, ErrRefused) != (name == "refuses") {
				t.Errorf("error %v", err)
			}
		})
	}
	if _, err := Release(t.Context(), filepath.Join(t.TempDir(), "none"), Owner{}, nil); err == nil {
		t.Error("no daemon, and no error")
	}
}
