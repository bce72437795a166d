package wholehost

import (
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"belay/vmtests/guest"
	"belay/vmtests/machine"
)

// mostExposed is what systemd-analyze security may count at most, of 10.
const mostExposed = 4.5

// TestHost: a host on which Belay's package was installed, with one guest: what systemd and
// logind do with belayd, and for it; holds, and a new QEMU by every method. In the end it boots
// in every way that there is.
func TestHost(t *testing.T) {
	b := newEmptyBed(t, machine.Config{})
	h := b.Hosts[0]
	must(t, h, "sh", "-c", `echo 'memory_backing_dir = "/dev/shm"' >>/etc/libvirt/qemu.conf && systemctl restart libvirtd.service`)
	b.boot(guest.Spec{FileMemory: true})

	t.Run("unit", func(t *testing.T) {
		for property, want := range map[string]string{
			"ActiveState": "active", "SubState": "running", "Type": "notify", "WatchdogUSec": "30s",
			"UnitFileState": "enabled", "NRestarts": "1", // its configuration was reloaded
		} {
			if got := show(t, h, "belayd.service", property); got != want {
				t.Errorf("%s of belayd.service is %q, want %q", property, got, want)
			}
		}
		if got := show(t, h, "belay-kernel.socket", "ActiveState"); got != "active" {
			t.Errorf("belay-kernel.socket is %s", got)
		}
		// belayd has it started before anything is asked of it.
		must(t, h, "timeout", "60", "sh", "-c", "until pgrep -x belay-kernel; do sleep .1; done")
		if failed := must(t, h, "systemctl", "list-units", "--failed", "--plain", "--no-legend", "belay*", "libvirt*", "virt*"); failed != "" {
			t.Errorf("units have failed:\n%s", failed)
		}
	})

	t.Run("sandbox", func(t *testing.T) {
		status := must(t, h, "cat", "/proc/"+show(t, h, "belayd.service", "MainPID")+"/status")
		hex := regexp.MustCompile(`CapBnd:\s*(\w+)`).FindStringSubmatch(status)
		if hex == nil {
			t.Fatalf("no CapBnd in %s", status)
		}
		bound, err := strconv.ParseUint(hex[1], 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		for name, bit := range map[string]int{"CAP_SYS_MODULE": 16, "CAP_SYS_BOOT": 22, "CAP_SYS_ADMIN": 21} {
			if bound&(1<<bit) != 0 {
				t.Errorf("belayd may have %s (CapBnd %#x)", name, bound)
			}
		}
		text := must(t, h, "systemd-analyze", "--no-pager", "security", "belayd.service")
		overall := regexp.MustCompile(`Overall exposure level for belayd.service: ([0-9.]+)`).FindStringSubmatch(text)
		if overall == nil {
			t.Fatalf("no exposure level in:\n%s", text)
		}
		if level, err := strconv.ParseFloat(overall[1], 64); err != nil || level > mostExposed {
			t.Errorf("exposure level %s (%v), want %.1f at most:\n%s", overall[1], err, mostExposed, text)
		}
		t.Logf("exposure level %s", overall[1])
	})

	t.Run("cli", func(t *testing.T) {
		t.Logf("belay status:\n%s", must(t, h, "belay", "status"))
		r, err := h.Belay(t.Context(), "doctor")
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("belay doctor (exit code %d):\n%s%s", r.Code, r.Stdout, r.Stderr)
	})

	t.Run("hold", func(t *testing.T) {
		b := b.within(t)
		if delay := must(t, h, "busctl", "get-property", "org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager", "InhibitDelayMaxUSec"); delay != "t 60000000" {
			t.Errorf("logind waits %s µs, want a minute", delay)
		}
		inhibitors := []string{"systemd-inhibit", "--list", "--no-pager"}
		if list := must(t, h, inhibitors...); strings.Contains(list, "belayd") {
			t.Errorf("belayd delays shutdowns without an operation:\n%s", list)
		}
		mark := b.obs.Mark()
		// The hold's own command looks.
		op := b.belay(h, append([]string{"hold", "--all", "--reason", "test", "--"}, inhibitors...)...)
		if op.Held == nil || op.Held.Step == nil || !op.Held.Step.OK() || !regexp.MustCompile(`belayd.*shutdown.*delay`).MatchString(op.Held.Step.Output) {
			t.Fatalf("the hold's command shows no delay by belayd: %+v", op.Held)
		}
		held := op.Held.Guests[0]
		if held.Problem != nil || held.ReleasedBy != "belayd" {
			t.Errorf("%+v", held)
		}
		b.isWhole(h)
		r := b.obs.Since(mark, "web-1")
		t.Logf("the guest was paused for %s by the record, was silent for %s; its clock: %+v", held.Pause, r.Pause(), held.Clock)
		if r.Restarts != 0 || r.Pause() < held.Pause/2 {
			t.Errorf("the observer saw no such pause: %+v", r)
		}
		if list := must(t, h, inhibitors...); strings.Contains(list, "belayd") {
			t.Errorf("belayd delays shutdowns after the operation:\n%s", list)
		}
	})

	t.Run("watchdog", func(t *testing.T) { b.within(t).watchdog() })
	for i, method := range []string{"in-place", "copy", "bounce", "prewarmed"} {
		if t.Failed() {
			break // the guest may be anywhere
		}
		t.Run(method, func(t *testing.T) {
			if i > 0 {
				inFull(t)
			}
			b.within(t).replaceVMM(method)
		})
	}
	t.Run("reboot within a hold", func(t *testing.T) { inFull(t); b.within(t).reboot() })
	// What the tests of other kernels stand on: a reset keeps the memory, a power cut does not.
	t.Run("reset", func(t *testing.T) {
		inFull(t)
		b := b.within(t)
		must(t, h, "sh", "-c", "echo kept >/var/lib/belay/memory/word && sync")
		b.again(h, func() error { return h.Reset(t.Context()) })
		if got := must(t, h, "cat", "/var/lib/belay/memory/word"); got != "kept" {
			t.Errorf("the reserved memory has %q", got)
		}
		b.awaitBelayd(h)
	})
	t.Run("power cut", func(t *testing.T) {
		inFull(t)
		b := b.within(t)
		must(t, h, "sh", "-c", "echo kept >/root/word && sync")
		b.again(h, func() error {
			if err := h.Cut(); err != nil {
				return err
			}
			return h.Start(t.Context())
		})
		if got := must(t, h, "cat", "/root/word"); got != "kept" {
			t.Errorf("the disk has %q", got)
		}
		if r, err := h.Exec(t.Context(), "cat", "/var/lib/belay/memory/word"); err != nil || r.Code == 0 {
			t.Errorf("the memory was kept without power: %+v, %v", r, err)
		}
		b.awaitBelayd(h)
	})
}

// again has the host boot, and waits for it.
func (b *bed) again(h *machine.Host, how func() error) {
	b.t.Helper()
	before, err := h.BootID(b.t.Context())
	if err == nil {
		err = how()
	}
	if err == nil {
		_, err = h.AwaitUp(b.ctx(3*time.Minute), before)
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

// awaitBelayd waits until systemd has started all of the host, belayd too, which answers.
func (b *bed) awaitBelayd(h *machine.Host) {
	b.t.Helper()
	ctx := b.ctx(3 * time.Minute)
	if r, err := h.Exec(ctx, "systemctl", "is-system-running", "--wait"); err != nil || r.Stdout == "" {
		b.t.Fatalf("the host has not started: %+v, %v", r, err)
	}
	if _, err := h.Run(ctx, "belay", "status"); err != nil {
		b.t.Fatal(err)
	}
}
