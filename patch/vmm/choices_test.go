package vmm_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/patch/vmm"
)

// fit are the facts of a guest that every method can serve.
func fit() vmm.Facts {
	return vmm.Facts{
		Guest: maint.Guest{Name: "web-1", State: maint.GuestRunning, Reason: "booted", MemoryBytes: 1 << 30, MachineType: "pc-q35-7.2", ID: 3, Persistent: true},
		Host:  maint.Host{FreeMemoryBytes: 8 << 30, QEMUVersion: "7.2.9", MachineTypes: []string{"pc-q35-7.2"}},
		QEMU:  "7.2.9", RunState: "running", PowerOff: "destroy", IgnoreShared: true,
		Memory: []vmm.Memory{{ID: "pc.ram", Kind: "memory-backend-file", Bytes: 1 << 30, Shared: true,
			Path: "/ram/libvirt/qemu/3-web-1/pc.ram", InRAM: true, Mapped: true, Ours: true}},
		Copies: "/dev/shm/belay-vmm", CopiesFree: 8 << 30, CopiesInRAM: true,
	}
}

func find(t *testing.T, choices []maint.VMMChoice, method maint.VMMMethod) maint.VMMChoice {
	t.Helper()
	for _, c := range choices {
		if c.Method == method {
			return c
		}
	}
	t.Fatalf("no %s among %+v", method, choices)
	return maint.VMMChoice{}
}

func TestChoices(t *testing.T) {
	t.Parallel()
	const all, in, cp, bo = "in-place copy bounce", "in-place", "copy", "bounce"
	for name, c := range map[string]struct {
		change  func(*vmm.Facts)
		code    maint.Code
		against string // methods
		reason  string
	}{
		"off":            {func(f *vmm.Facts) { f.Guest.State = maint.GuestShutoff }, maint.CodeGuestOff, all, "is shut off"},
		"paused":         {func(f *vmm.Facts) { f.Guest.State, f.Guest.Reason = maint.GuestPaused, "user" }, maint.CodeGuestPaused, all, "Belay did not pause it"},
		"suspended":      {func(f *vmm.Facts) { f.Guest.State = maint.GuestSuspended }, maint.CodeGuestState, all, "pmsuspended"},
		"QEMU disagrees": {func(f *vmm.Facts) { f.RunState = "io-error" }, maint.CodeGuestState, all, "io-error"},
		"job":            {func(f *vmm.Facts) { f.Guest.Job = "backup" }, maint.CodeBusy, all, "backup job"},
		"block job":      {func(f *vmm.Facts) { f.BlockJobs = []string{"mirror on vda"} }, maint.CodeBusy, all, "mirror on vda"},
		"encrypted":      {func(f *vmm.Facts) { f.Sealed = "sev" }, maint.CodeDevice, all, "sev"},
		"host device":    {func(f *vmm.Facts) { f.Unfit = []string{"host device 0000:03:00.0"} }, maint.CodeDevice, all, "0000:03:00.0"},
		"blocked":        {func(f *vmm.Facts) { f.Blockers = []string{"State blocked by non-migratable CPU device"} }, maint.CodeQEMU, all, "non-migratable CPU"},
		"snapshots":      {func(f *vmm.Facts) { f.Snapshots, f.Guest.Persistent = true, false }, maint.CodeDevice, all, "is transient"},
		"machine type":   {func(f *vmm.Facts) { f.Host.MachineTypes = []string{"pc-q35-8.0"} }, maint.CodeMachineType, all, "pc-q35-7.2"},
		"older QEMU":     {func(f *vmm.Facts) { f.QEMU = "10.0.2" }, maint.CodeQEMU, all, "runs in QEMU 10.0.2, and the host's is 7.2.9"},
		"kept":           {func(f *vmm.Facts) { f.Guarded = "rep-1" }, maint.CodeKept, all, "rep-1"},

		"memfd":           {func(f *vmm.Facts) { f.Memory[0].Kind = "memory-backend-memfd" }, maint.CodeMemory, in, "(memfd) is in no file"},
		"anonymous":       {func(f *vmm.Facts) { f.Memory[0].Kind = "memory-backend-ram" }, maint.CodeMemory, in, "(ram) is in no file"},
		"private":         {func(f *vmm.Facts) { f.Memory[0].Shared = false }, maint.CodeMemory, in, "not shared"},
		"discard":         {func(f *vmm.Facts) { f.Memory[0].Discard = true }, maint.CodeMemory, in, "throws its memory pc.ram away"},
		"on disk":         {func(f *vmm.Facts) { f.Memory[0].InRAM = false }, maint.CodeMemory, in, "not in RAM"},
		"another file":    {func(f *vmm.Facts) { f.Memory[0].Mapped = false }, maint.CodeMemory, in, "no longer, the file"},
		"no memory":       {func(f *vmm.Facts) { f.Memory = nil }, maint.CodeMemory, in, "names no memory"},
		"no capability":   {func(f *vmm.Facts) { f.IgnoreShared = false }, maint.CodeQEMU, in, "x-ignore-shared"},
		"restarts":        {func(f *vmm.Facts) { f.PowerOff = "restart" }, maint.CodeDevice, in, "is to restart it"},
		"no hook":         {func(f *vmm.Facts) { f.Hook = "it is not there" }, maint.CodeHook, in, "it is not there"},
		"confined":        {func(f *vmm.Facts) { f.Reach, f.UID = "Permission denied", 64055 }, maint.CodeConfined, in, "user 64055"},
		"SELinux":         {func(f *vmm.Facts) { f.Confined = "system_u:system_r:svirt_t:s0:c1,c2" }, maint.CodeConfined, in, "SELinux"},
		"emulated TPM":    {func(f *vmm.Facts) { f.OneWay = []string{"an emulated TPM"} }, maint.CodeDevice, in + bo, "an emulated TPM"},
		"copies on disk":  {func(f *vmm.Facts) { f.CopiesInRAM = false }, maint.CodeNoRoom, cp, "not in RAM"},
		"copies full":     {func(f *vmm.Facts) { f.CopiesFree = 1 << 30 }, maint.CodeNoRoom, cp, "needs 1088 MiB in /dev/shm/belay-vmm, which has 1024 MiB"},
		"no free memory":  {func(f *vmm.Facts) { f.Host.FreeMemoryBytes = 1 << 30 }, maint.CodeNoRoom, cp + bo, "1024 MiB free"},
		"fixed vsock":     {func(f *vmm.Facts) { f.FixedCID = true }, maint.CodeDevice, bo, "vsock"},
		"no second host":  {func(f *vmm.Facts) { f.Bounce = []maint.Problem{{Code: maint.CodeFailed, Reason: "no second libvirtd"}} }, maint.CodeFailed, bo, "no second libvirtd"},
		"nothing against": {func(f *vmm.Facts) {}, "", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := fit()
			c.change(&f)
			for _, choice := range vmm.Choices(f) {
				said := false
				for _, p := range choice.Problems {
					said = said || p.Code == c.code && strings.Contains(p.Reason, c.reason)
					if p.Reason == "" || p.Remedy == "" && p.Code != maint.CodeFailed {
						t.Errorf("%s: %+v does not help", choice.Method, p)
					}
				}
				if want := strings.Contains(c.against, string(choice.Method)); said != want || (len(choice.Problems) > 0) != want {
					t.Errorf("%s: %+v", choice.Method, choice.Problems)
				}
			}
		})
	}
}

// The cheapest for the guest comes first; what is not possible comes last.
func TestChoicesInOrder(t *testing.T) {
	t.Parallel()
	order := func(f vmm.Facts) (s string) {
		for _, c := range vmm.Choices(f) {
			s += string(c.Method) + " "
		}
		return s
	}
	f := fit()
	if got := order(f); got != "bounce in-place copy " {
		t.Error(got)
	}
	f.FixedCID = true
	if got := order(f); got != "in-place copy bounce " {
		t.Error(got)
	}
	f.NoBounce = true
	if got := order(f); got != "in-place copy " {
		t.Error(got)
	}

	big := fit()
	big.Guest.MemoryBytes *= 64
	small, large := vmm.Choices(fit()), vmm.Choices(big)
	if a, b := find(t, small, maint.VMMInPlace), find(t, large, maint.VMMInPlace); a.Pause != b.Pause || a.MemoryBytes != b.MemoryBytes {
		t.Errorf("in place, the size of memory counts: %+v, %+v", a, b)
	}
	if a, b := find(t, small, maint.VMMCopy), find(t, large, maint.VMMCopy); b.Pause < 10*a.Pause || b.MemoryBytes < 60*a.MemoryBytes {
		t.Errorf("in a copy, the size of memory does not count: %+v, %+v", a, b)
	}
}

func TestChoose(t *testing.T) {
	t.Parallel()
	choose := func(f vmm.Facts, method maint.VMMMethod, most time.Duration) (maint.VMMMethod, string) {
		c, err := vmm.Choose("web-1", vmm.Choices(f), method, most)
		var r *maint.Refusal
		if err != nil && !errors.As(err, &r) {
			t.Fatalf("%v is no refusal", err)
		}
		if err != nil {
			return c.Method, err.Error()
		}
		return c.Method, ""
	}
	f := fit()
	if got, no := choose(f, "", 0); got != maint.VMMBounce || no != "" {
		t.Error(got, no)
	}
	if got, no := choose(f, maint.VMMCopy, 0); got != maint.VMMCopy || no != "" {
		t.Error(got, no)
	}
	if _, no := choose(f, maint.VMMCopy, 100*time.Millisecond); !strings.Contains(no, "at most 100ms is accepted") {
		t.Error(no)
	}
	f.FixedCID, f.Hook = true, "none"
	if got, no := choose(f, "", 0); got != maint.VMMCopy || no != "" {
		t.Error(got, no)
	}
	f.CopiesFree = 0
	_, no := choose(f, "", 0)
	for _, want := range []string{"vsock", "hook: none", "has 0 MiB"} {
		if !strings.Contains(no, want) {
			t.Errorf("no %q in %q", want, no)
		}
	}
	unproven := []maint.VMMChoice{{Method: maint.VMMPrewarmed, Unproven: "nobody has tried"}, {Method: maint.VMMCopy, Pause: time.Minute}}
	for _, c := range []struct {
		of     []maint.VMMChoice
		asked  maint.VMMMethod
		method maint.VMMMethod
	}{{unproven, "", maint.VMMCopy}, {unproven, maint.VMMPrewarmed, maint.VMMPrewarmed}, {unproven[:1], "", ""}} {
		if got, err := vmm.Choose("web-1", c.of, c.asked, 0); got.Method != c.method || (err == nil) != (c.method != "") || err != nil && !strings.Contains(err.Error(), "nobody has tried") {
			t.Errorf("asked for %q: %q, %v", c.asked, got.Method, err)
		}
	}
	f = fit()
	f.Guest.State = maint.GuestShutoff // the same reason against all is said once
	if _, no := choose(f, "", 0); strings.Count(no, "shut off") != 1 {
		t.Error(no)
	}
	if _, no := choose(fit(), "magic", 0); !strings.Contains(no, "magic") {
		t.Error(no)
	}
}
