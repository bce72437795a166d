package agent

import (
	"cmp"
	"context"

	"belay/agent/maint"
	"belay/agent/plan"
)

// Rungs says which rungs of the ladder can be taken with a guest, or with "" with each that
// runs, whatever the update: what plans are made from. Nothing is changed.
func (a *Agent) Rungs(ctx context.Context, guest string) (maint.LadderView, error) {
	const what = "cannot say which rungs there are"
	v := maint.LadderView{Host: a.cfg.Host}
	only := ""
	if guest != "" {
		g, err := a.guest(ctx, what, guest)
		if err != nil {
			return v, err
		}
		only = keyOf(g)
	}
	u := plan.Every(a.runningKernel())
	l, err := a.ladder(ctx, u, maint.PlanOptions{}, only)
	if err != nil {
		return v, a.cannotAsk(what, err)
	}
	checks, err := a.Doctor(ctx)
	if err != nil {
		return v, a.cannotAsk(what, err)
	}
	v.Rungs, v.Guests, v.Off = maint.ByRung(checks), plan.Rungs(u, l), append([]string{}, l.Off...)
	return v, nil
}

// runningKernel is what the kernel that runs would be started from once more.
func (a *Agent) runningKernel() maint.KernelImage {
	t := a.preserve.Kexec.Tree
	release, _ := t.Release() // that it cannot be read is said of rung B3
	k := t.Image(release)
	k.Kernel, k.Initrd = cmp.Or(k.Kernel, "/boot/vmlinuz-"+release), cmp.Or(k.Initrd, "/boot/initrd.img-"+release)
	return k
}
