package guestclock_test

import (
	"context"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"belay/vmtests/guest"
	"belay/vmtests/lab"
)

func TestIdle(t *testing.T) {
	img, accel := guest.ForTest(t)
	l := lab.ForTest(t, lab.Config{Hosts: 1, QEMU: img.QEMU})
	h := l.Hosts[0]
	ctx, cancel := context.WithTimeout(t.Context(), 9*time.Minute)
	defer cancel()
	if _, err := guest.Start(ctx, h, guest.Spec{Name: "g0", Accel: accel, Cmdline: os.Getenv("CMDLINE")}, img); err != nil {
		t.Fatal(err)
	}
	pid, _ := os.ReadFile(h.Path("/run/libvirt/qemu/g0.pid"))
	cpu := func() (r int) {
		b, _ := os.ReadFile("/proc/" + strings.TrimSpace(string(pid)) + "/stat")
		f := strings.Fields(string(b))
		u, _ := strconv.Atoi(f[13])
		s, _ := strconv.Atoi(f[14])
		return u + s
	}
	time.Sleep(2 * time.Second)
	for range 3 {
		a := cpu()
		time.Sleep(5 * time.Second)
		t.Logf("cpu %d ticks of 500", cpu()-a)
	}
	c, err := guest.Dial(ctx, h, "g0")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	st, err := c.Status(ctx)
	t.Logf("%+v %v", st, err)
	con, _ := os.ReadFile(h.Path(guest.ConsolePath("g0")))
	for _, l := range strings.Split(string(con), "\n") {
		if strings.Contains(l, "clock") || strings.Contains(l, "tsc") || strings.Contains(l, "imer") || strings.Contains(l, "rtc") || strings.Contains(l, "igh res") {
			t.Log(l)
		}
	}
}
