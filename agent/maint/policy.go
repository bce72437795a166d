package maint

import (
	"slices"
	"time"
)

// GuestPolicy is what may be done to a guest, and when. The zero value of a field says
// nothing, so that policies can be laid over each other; an empty list says none.
type GuestPolicy struct {
	// MaxPause is the longest that it may stand still by rung B, and MaxBlackout by D;
	// 0 is no limit.
	MaxPause    time.Duration `json:"max_pause_ns,omitempty"`
	MaxBlackout time.Duration `json:"max_blackout_ns,omitempty"`
	// Refuse are rungs that are not for it, and Prefer those that are taken before others
	// that it would feel less. B is B1, B2 and B3.
	Refuse []Rung `json:"refuse,omitzero"`
	Prefer []Rung `json:"prefer,omitzero"`
	// Ask are rungs that wait for its owner's approval, or for the update's deadline:
	// rung C.
	Ask []Rung `json:"ask,omitzero"`
	// Notice is how long beforehand it is told, and SecurityNotice that of an update that
	// closes a hole; never shorter than MinimumNotice.
	Notice         time.Duration `json:"notice_ns,omitempty"`
	SecurityNotice time.Duration `json:"security_notice_ns,omitempty"`
	// Windows are when it may be disturbed; none: at any time.
	Windows []Window `json:"windows,omitzero"`
	// AntiAffinity are groups of which there is to be one guest on a host.
	AntiAffinity []string `json:"anti_affinity,omitempty"`
	// Priority is who is served where not all can be, and whose move begins first: the
	// higher, from -100 to 100.
	Priority int    `json:"priority,omitempty"`
	Owner    string `json:"owner,omitempty"`
}

// MaxPriority bounds a GuestPolicy's Priority, both ways.
const MaxPriority = 100

// Over is a policy laid over another: what it says counts, else what that says. Groups
// add up.
func (p GuestPolicy) Over(under GuestPolicy) GuestPolicy {
	laid := under
	if p.MaxPause != 0 {
		laid.MaxPause = p.MaxPause
	}
	if p.MaxBlackout != 0 {
		laid.MaxBlackout = p.MaxBlackout
	}
	if p.Refuse != nil {
		laid.Refuse = p.Refuse
	}
	if p.Prefer != nil {
		laid.Prefer = p.Prefer
	}
	if p.Ask != nil {
		laid.Ask = p.Ask
	}
	if p.Notice != 0 {
		laid.Notice = p.Notice
	}
	if p.SecurityNotice != 0 {
		laid.SecurityNotice = p.SecurityNotice
	}
	if p.Windows != nil {
		laid.Windows = p.Windows
	}
	if p.Priority != 0 {
		laid.Priority = p.Priority
	}
	if p.Owner != "" {
		laid.Owner = p.Owner
	}
	groups := slices.Concat(under.AntiAffinity, p.AntiAffinity)
	slices.Sort(groups)
	laid.AntiAffinity = slices.Compact(groups)
	return laid
}

// NoticeFor is the notice that a policy asks for before an update of an urgency.
func (p GuestPolicy) NoticeFor(u Urgency) time.Duration {
	switch {
	case u == UrgencyEmergency:
		return 0
	case u == UrgencySecurity && p.SecurityNotice != 0:
		return p.SecurityNotice
	}
	return p.Notice
}

// Check lists what contradicts itself in a policy, or cannot be meant. subject is whose
// it is: "guest web-1".
func (p GuestPolicy) Check(subject string) (ps []Problem) {
	add := func(remedy, format string, args ...any) {
		ps = append(ps, *Problemf(CodePolicy, subject, remedy, format, args...))
	}
	felt := []Rung{AllOfB, RungB1, RungB2, RungB3, RungD}
	lists := []struct {
		name  string
		rungs []Rung
	}{{"refuse", p.Refuse}, {"prefer", p.Prefer}, {"ask", p.Ask}}
	for _, l := range lists {
		for _, r := range l.rungs {
			if !slices.Contains(felt, r) {
				add("name some of B, B1, B2, B3 and D: A is never felt, and C follows from ask and from windows", "%s has %.20q, which is no rung that a guest feels", l.name, r)
			}
		}
	}
	both := func(a, b []Rung) (common []Rung) {
		for _, r := range []Rung{RungB1, RungB2, RungB3, RungD} {
			if r.In(a) && r.In(b) {
				common = append(common, r)
			}
		}
		return common
	}
	if rs := both(p.Refuse, p.Prefer); len(rs) > 0 {
		add("take them out of one", "refuses and prefers %v", rs)
	}
	if rs := both(p.Refuse, p.Ask); len(rs) > 0 {
		add("take them out of one: who asks is not refused", "refuses %v, and has them ask", rs)
	}
	if all := []Rung{RungB1, RungB2, RungB3, RungD}; len(both(p.Refuse, all)) == len(all) {
		add("have one of them ask its owner instead (ask)", "refuses every rung that is felt: no kernel or QEMU could ever be updated under it, and its host never be emptied")
	}
	for name, d := range map[string]time.Duration{"max_pause": p.MaxPause, "max_blackout": p.MaxBlackout} {
		if d < 0 || d != 0 && d < time.Millisecond || d > 24*time.Hour {
			add("choose one from 1ms to 24h, or leave it out", "%s %s is out of range", name, d)
		}
	}
	least, most := MinimumNotice(ImpactFreeze), 7*24*time.Hour
	for name, d := range map[string]time.Duration{"notice": p.Notice, "security_notice": p.SecurityNotice} {
		if d != 0 && (d < least || d > most) {
			add("choose one between them, or leave it out", "%s %s is not between %s and %s", name, d, least, most)
		}
	}
	if p.SecurityNotice > p.Notice && p.Notice != 0 {
		add("make it shorter, or leave it out", "security_notice %s is longer than notice %s", p.SecurityNotice, p.Notice)
	}
	if p.Priority < -MaxPriority || p.Priority > MaxPriority {
		add("", "priority %d is not between %d and %d", p.Priority, -MaxPriority, MaxPriority)
	}
	if why := validGroups(p.AntiAffinity); why != "" {
		add("", "anti_affinity: %s", why)
	}
	if p.Owner != "" && !plain(p.Owner, maxWord) {
		add("", "owner %.60q is too long, or has control characters", p.Owner)
	}
	slices.SortFunc(ps, func(a, b Problem) int {
		if a.Reason < b.Reason {
			return -1
		}
		return 1
	})
	return ps
}

// PolicyView is a guest's policy, and what it comes to.
type PolicyView struct {
	Guest string `json:"guest"`
	UUID  string `json:"uuid"`
	// Own is what it has in its <metadata>, Whole that laid over what the configuration
	// has for it, and for all.
	Own   GuestPolicy `json:"own"`
	Whole GuestPolicy `json:"whole"`
	// Problems are what contradicts itself, or something else.
	Problems []Problem `json:"problems"`
}
