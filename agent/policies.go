package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"belay/agent/config"
	"belay/agent/maint"
	"belay/notify/window"
)

// policyAhead is how far ahead a policy's windows are looked at.
const policyAhead = 30 * 24 * time.Hour

// configured is what the configuration has for a guest, laid over what it has for all.
func (a *Agent) configured(g maint.EventGuest) maint.GuestPolicy {
	p := a.cfg.Policy.Policy()
	for _, r := range a.cfg.Policy.Guests {
		if matches(r.Names, g) {
			p = r.Policy().Over(p)
		}
	}
	if p.Windows == nil {
		for _, w := range a.cfg.Events.Windows {
			if matches(w.Guests, g) {
				p.Windows = append(p.Windows, windowOf(w))
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(a.cfg.Events.Owners)) {
		if p.Owner == "" && matches(a.cfg.Events.Owners[name].Guests, g) {
			p.Owner = name
		}
	}
	return p
}

// ownPolicy is what a guest has in its <metadata>.
func ownPolicy(g maint.Guest) (maint.GuestPolicy, error) {
	if g.Policy == "" {
		return maint.GuestPolicy{}, nil
	}
	return config.ParsePolicy("guest "+g.Name, g.Policy)
}

// policyOf is what holds for a guest. Of one whose own policy cannot be read only what the
// configuration says is known: an error says that there is more.
func (a *Agent) policyOf(g maint.Guest) (whole maint.GuestPolicy, err error) {
	whole = a.configured(maint.EventGuest{UUID: g.UUID, Name: g.Name})
	own, err := ownPolicy(g)
	if err == nil {
		whole = own.Over(whole)
	}
	whole.AntiAffinity = a.groupsOf(g)
	if a.cfg.Events.Enabled { // shorter notice is not given to anybody
		least := max(maint.MinimumNotice(maint.ImpactFreeze), a.cfg.Events.Notice[string(maint.ImpactFreeze)].Duration)
		whole.Notice = max(whole.Notice, least)
		whole.SecurityNotice = max(whole.SecurityNotice, least)
	}
	return whole, err
}

// policyGroups are the anti-affinity groups of a guest's policies.
func (a *Agent) policyGroups(g maint.Guest) (groups []string) {
	for _, r := range a.cfg.Policy.Guests {
		if matches(r.Names, maint.EventGuest{UUID: g.UUID, Name: g.Name}) {
			groups = append(groups, r.AntiAffinity...)
		}
	}
	own, _ := ownPolicy(g) // who reads it for more says that it cannot be read
	return append(groups, own.AntiAffinity...)
}

// policyView is a guest's policy, with what is wrong with it among the guests that are here.
func (a *Agent) policyView(g maint.Guest, guests []maint.Guest) maint.PolicyView {
	subject := "guest " + g.Name
	v := maint.PolicyView{Guest: g.Name, UUID: g.UUID, Problems: []maint.Problem{}}
	var err error
	if v.Own, err = ownPolicy(g); err != nil {
		v.Problems = append(v.Problems, *maint.AsProblem(err, maint.CodePolicy, subject))
	}
	v.Whole, _ = a.policyOf(g)
	add := func(remedy, format string, args ...any) {
		p := *maint.Problemf(maint.CodePolicy, subject, remedy, format, args...)
		if !slices.Contains(v.Problems, p) {
			v.Problems = append(v.Problems, p)
		}
	}
	for _, p := range slices.Concat(v.Own.Check(subject), v.Whole.Check(subject)) {
		add(p.Remedy, "%s", p.Reason)
	}
	switch s, err := window.Parse(v.Whole.Windows...); {
	case err != nil:
		var p *maint.Problem
		if errors.As(err, &p) {
			add(p.Remedy, "%s: %s", p.Subject, p.Reason)
		} else {
			add("", "windows: %v", err)
		}
	case len(v.Whole.Windows) > 0 && len(s.Slots(time.Now(), time.Now().Add(policyAhead))) == 0:
		add("choose windows that come more often", "none of its windows opens within %d days: every update would wait for its deadline", policyAhead/(24*time.Hour))
	}
	if !a.cfg.Events.Enabled {
		if v.Whole.Notice > 0 || v.Whole.SecurityNotice > 0 {
			add("set events.enabled, or take the notice out", "asks for notice, and this host does not tell guests of anything: no rung that it feels would be allowed but in an emergency")
		}
		if len(v.Whole.Ask) > 0 {
			add("set events.enabled, or refuse them (refuse)", "has %v ask its owner, and this host does not tell guests of anything", v.Whole.Ask)
		}
	}
	if c := a.configured(maint.EventGuest{UUID: g.UUID, Name: g.Name}); v.Own.Owner != "" && c.Owner != "" && c.Owner != v.Own.Owner {
		add("name one owner", "belongs to %s, and events.owners or the policy of this host say %s", v.Own.Owner, c.Owner)
	}
	for _, group := range v.Whole.AntiAffinity {
		for _, other := range guests {
			if other.UUID != g.UUID && other.State.Active() && g.State.Active() && slices.Contains(a.groupsOf(other), group) {
				add("move one of them (belay migrate)", "is on this host together with guest %s, which is of anti-affinity group %s, too", other.Name, group)
			}
		}
	}
	return v
}

// Policies are those of all guests.
func (a *Agent) Policies(ctx context.Context) ([]maint.PolicyView, error) {
	guests, err := a.hyp.Guests(ctx)
	if err != nil {
		return nil, a.cannotAsk("cannot read the guests' policies", err)
	}
	views := []maint.PolicyView{}
	for _, g := range guests {
		views = append(views, a.policyView(g, guests))
	}
	slices.SortFunc(views, func(x, y maint.PolicyView) int { return strings.Compare(x.Guest, y.Guest) })
	return views, nil
}

// Policy is that of one.
func (a *Agent) Policy(ctx context.Context, guest string) (maint.PolicyView, error) {
	what := "cannot read the policy of guest " + guest
	g, err := a.guest(ctx, what, guest)
	if err != nil {
		return maint.PolicyView{}, err
	}
	guests, err := a.hyp.Guests(ctx)
	if err != nil {
		return maint.PolicyView{}, a.cannotAsk(what, err)
	}
	return a.policyView(g, guests), nil
}

// SetPolicy gives a guest another policy in its <metadata>, where it goes along wherever the
// guest does. What contradicts itself is refused; what was wrong before, and still is, is not
// held against it.
func (a *Agent) SetPolicy(ctx context.Context, by, guest string, p maint.GuestPolicy) (maint.PolicyView, error) {
	what := "cannot change the policy of guest " + guest
	g, err := a.guest(ctx, what, guest)
	if err != nil {
		return maint.PolicyView{}, err
	}
	guests, err := a.hyp.Guests(ctx)
	if err != nil {
		return maint.PolicyView{}, a.cannotAsk(what, err)
	}
	before := a.policyView(g, guests)
	if g.Policy, err = config.FormatPolicy(p); err != nil {
		return maint.PolicyView{}, fmt.Errorf("%s: %w", what, err)
	}
	v := a.policyView(g, guests)
	fresh := slices.DeleteFunc(slices.Clone(v.Problems), func(p maint.Problem) bool { return slices.Contains(before.Problems, p) })
	if err := maint.Refuse(what, fresh); err != nil {
		return maint.PolicyView{}, err
	}
	if err := a.hyp.SetPolicy(ctx, g.UUID, g.Policy); err != nil {
		return maint.PolicyView{}, a.cannotAsk(what, err)
	}
	a.log.Info("the policy of a guest was changed", "guest", g.Name, "by", by, "policy", g.Policy)
	return v, nil
}
