package config

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"belay/agent/maint"
)

// Policy is what may be done to guests, and when. Guests say so too, in their <metadata>,
// which counts for more.
type Policy struct {
	Rules
	// Guests are policies of some, laid over that of all, later ones over earlier.
	Guests []GuestRules `toml:"guests"`
}

// GuestRules are the policy of some guests.
type GuestRules struct {
	Names []string `toml:"names"` // names, patterns of names ("db-*"), or UUIDs
	Rules
}

// Rules are a maint.GuestPolicy as it is written.
type Rules struct {
	MaxPause       *Duration     `toml:"max_pause,omitempty"`
	MaxBlackout    *Duration     `toml:"max_blackout,omitempty"`
	Refuse         []maint.Rung  `toml:"refuse,omitempty"`
	Prefer         []maint.Rung  `toml:"prefer,omitempty"`
	Ask            []maint.Rung  `toml:"ask,omitempty"`
	Notice         *Duration     `toml:"notice,omitempty"`
	SecurityNotice *Duration     `toml:"security_notice,omitempty"`
	Windows        []RulesWindow `toml:"windows,omitempty"`
	AntiAffinity   []string      `toml:"anti_affinity,omitempty"`
	Priority       int           `toml:"priority,omitempty"`
	Owner          string        `toml:"owner,omitempty"`
}

// RulesWindow is a maint.Window as it is written.
type RulesWindow struct {
	Rule   string   `toml:"rule"`
	Zone   string   `toml:"zone"`
	Length Duration `toml:"length"`
	From   string   `toml:"from,omitempty"`
	Except []string `toml:"except,omitempty"`
}

// MarshalText implements encoding.TextMarshaler.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// Policy is what the rules say.
func (r Rules) Policy() maint.GuestPolicy {
	p := maint.GuestPolicy{MaxPause: lasts(r.MaxPause), MaxBlackout: lasts(r.MaxBlackout), Refuse: r.Refuse, Prefer: r.Prefer, Ask: r.Ask,
		Notice: lasts(r.Notice), SecurityNotice: lasts(r.SecurityNotice), AntiAffinity: r.AntiAffinity, Priority: r.Priority, Owner: r.Owner}
	for _, w := range r.Windows {
		p.Windows = append(p.Windows, maint.Window{Rule: w.Rule, Zone: w.Zone, Length: w.Length.Duration, From: w.From, Except: w.Except})
	}
	if r.Windows != nil && p.Windows == nil { // none, where others have some
		p.Windows = []maint.Window{}
	}
	return p
}

func lasts(d *Duration) time.Duration {
	if d == nil {
		return 0
	}
	return d.Duration
}

// FormatPolicy writes a policy as ParsePolicy reads it: what a guest has in its <metadata>.
// A policy that says nothing is "".
func FormatPolicy(p maint.GuestPolicy) (string, error) {
	long := func(d time.Duration) *Duration {
		if d == 0 {
			return nil
		}
		return &Duration{d}
	}
	r := Rules{MaxPause: long(p.MaxPause), MaxBlackout: long(p.MaxBlackout), Refuse: p.Refuse, Prefer: p.Prefer, Ask: p.Ask,
		Notice: long(p.Notice), SecurityNotice: long(p.SecurityNotice), AntiAffinity: p.AntiAffinity, Priority: p.Priority, Owner: p.Owner}
	for _, w := range p.Windows {
		r.Windows = append(r.Windows, RulesWindow{Rule: w.Rule, Zone: w.Zone, Length: Duration{w.Length}, From: w.From, Except: w.Except})
	}
	var b bytes.Buffer
	// An empty list overrides another, and would be left out.
	for name, empty := range map[string]bool{"refuse": p.Refuse != nil && len(p.Refuse) == 0, "prefer": p.Prefer != nil && len(p.Prefer) == 0,
		"ask": p.Ask != nil && len(p.Ask) == 0, "windows": p.Windows != nil && len(p.Windows) == 0} {
		if empty {
			fmt.Fprintf(&b, "%s = []\n", name)
		}
	}
	err := toml.NewEncoder(&b).Encode(r)
	return b.String(), err
}

// maxPolicy is more than any guest's policy has, bytes.
const maxPolicy = 64 << 10

// ParsePolicy reads a guest's policy. Its error is a *maint.Problem about the subject.
func ParsePolicy(subject, text string) (maint.GuestPolicy, error) {
	bad := func(format string, args ...any) (maint.GuestPolicy, error) {
		return maint.GuestPolicy{}, maint.Problemf(maint.CodePolicy, subject, "write it anew (belay policy set)", "its policy in <metadata> cannot be read: "+format, args...)
	}
	if len(text) > maxPolicy {
		return bad("it has %d KiB", len(text)>>10)
	}
	var r Rules
	err := toml.NewDecoder(strings.NewReader(text)).DisallowUnknownFields().Decode(&r)
	var missing *toml.StrictMissingError
	if errors.As(err, &missing) && len(missing.Errors) > 0 {
		return bad("there is no setting %q", strings.Join(missing.Errors[0].Key(), "."))
	}
	if err != nil {
		return bad("%s", strings.TrimPrefix(err.Error(), "toml: "))
	}
	return r.Policy(), nil
}

// check refuses policies that contradict themselves.
func (p Policy) check(bad func(key, format string, args ...any), named func(key string, guests []string)) {
	say := func(key string, r Rules) {
		for _, why := range r.Policy().Check(key) {
			text := why.Reason
			if why.Remedy != "" {
				text += "; " + why.Remedy
			}
			bad(key, "%s", text)
		}
	}
	say("policy", p.Rules)
	for i, g := range p.Guests {
		key := fmt.Sprintf("policy.guests, number %d", i+1)
		named(key, g.Names)
		say(key, g.Rules)
	}
	if slices.ContainsFunc([]bool{p.Owner != "", len(p.AntiAffinity) > 0, p.Priority != 0}, func(b bool) bool { return b }) {
		bad("policy", "owner, anti_affinity and priority are of some guests; put them into [[policy.guests]]")
	}
}
