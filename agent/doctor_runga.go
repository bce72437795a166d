package agent

import (
	"context"
	"fmt"

	"belay/agent/maint"
	"belay/patch/live"
)

// doctorA says what is missing for rung A.
func (a *Agent) doctorA(ctx context.Context) []maint.Check {
	var checks []maint.Check
	add := func(name string, r maint.CheckResult, remedy, format string, args ...any) {
		checks = append(checks, maint.Check{Rung: "A", Name: name, Result: r, Text: fmt.Sprintf(format, args...), Remedy: remedy})
	}
	h := a.preserve.Live.Host
	if why := h.Tree.Supported(); why != "" {
		add("livepatch", maint.CheckWarn, "boot a kernel with CONFIG_LIVEPATCH=y; until then use rung B3 or D", "%s", why)
	} else if v, err := a.Patches(ctx); err != nil {
		add("livepatch", maint.CheckFail, "see that /sys and /proc are mounted", "%v", err)
	} else {
		text := "the kernel takes livepatches"
		if v.Active != nil {
			text += ", " + v.Active.Name + " is kept"
		}
		add("livepatch", maint.CheckOK, "", "%s", text)
		if v.AutoOff != "" {
			add("loading at boot", maint.CheckWarn, "belay patch reload, when you know why", "off: %s", v.AutoOff)
		}
	}
	if keys, err := live.ReadKeys(h.Keys); err != nil {
		p := maint.AsProblem(err, maint.CodePatchSigned, "keys")
		add("keys", maint.CheckWarn, p.Remedy, "no livepatch can be loaded: %s %s", p.Subject, p.Reason)
	} else {
		add("keys", maint.CheckOK, "", "%d in %s", len(keys), h.Keys)
	}
	// What only the privileged can see is the least that is asked of who touches the kernel.
	if _, err := h.Witness.LogEnd(ctx); err != nil {
		p := maint.AsProblem(err, maint.CodeNoHelper, "kernel")
		add("kernel access", maint.CheckWarn, p.Remedy, "no livepatch can be loaded: %s %s", p.Subject, p.Reason)
	} else {
		add("kernel access", maint.CheckOK, "", "the kernel can be reached, and its log read")
	}
	if cpus, err := h.Tree.Microcode(); err != nil || len(cpus) == 0 || !h.Tree.LoadsMicrocode() {
		add("CPU microcode", maint.CheckNA, "put it into the initrd, and use rung B3 or D", "this kernel loads none late")
	} else {
		add("CPU microcode", maint.CheckOK, "", "can be loaded late; revision %s", cpus[0].Revision)
	}
	return append(checks, a.checkQEMU())
}

// checkQEMU: whose QEMU can be patched while it runs.
func (a *Agent) checkQEMU() maint.Check {
	c := maint.Check{Rung: "A", Name: "QEMU", Result: maint.CheckOK, Text: "every guest's QEMU has libpulp.so preloaded: libraries that were built for it can be patched (belay patch qemu)"}
	ulp := live.Libpulp{Tree: a.preserve.Live.Host.Tree}
	var first string
	n, names := a.running(func(g maint.Guest) bool {
		why := ulp.Ready(a.preserve.Live.QEMU(g.Name))
		if first == "" {
			first = why
		}
		return why != ""
	})
	if n > 0 {
		c.Result, c.Text = maint.CheckNA, fmt.Sprintf("the QEMU of %d guests cannot be patched while it runs, use rung B2 (belay replace-vmm): %s; %s", n, names, first)
	}
	return c
}
