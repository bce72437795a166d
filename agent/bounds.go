package agent

import (
	"slices"
	"strings"
	"unicode"

	"belay/agent/maint"
	"belay/patch/hoststep"
)

// What a request may say at most. All of it is journaled, some of it again with
// each problem that is told of it.
const (
	maxNamed  = 4096 // guests, and members of groups: what a leash can have
	maxReason = 1000 // bytes
)

func badRequest(field, remedy, format string, args ...any) error {
	return maint.Problemf(maint.CodeBadRequest, field, remedy, format, args...)
}

// checkReason refuses a reason that is not a line of text.
func checkReason(reason string) error { return checkLine("reason", reason) }

// checkEmergency refuses one for no reason.
func checkEmergency(why string) error {
	if why != "" && strings.TrimSpace(why) == "" {
		return badRequest("emergency", "say why the guests' notice is waived", "has a blank reason")
	}
	return checkLine("emergency", why)
}

func checkLine(field, text string) error {
	switch {
	case len(text) > maxReason:
		return badRequest(field, "make it shorter", "has %d bytes, more than %d", len(text), maxReason)
	case strings.ContainsFunc(text, unicode.IsControl):
		return badRequest(field, "write it in one line", "has control characters")
	}
	return nil
}

// checkNames refuses what can be refused of a hold's guests without knowing them.
func checkNames(r maint.HoldRequest) error {
	members := 0
	for _, names := range r.Groups {
		members += len(names)
	}
	for field, n := range map[string]int{"guests": len(r.Guests), "groups": max(members, len(r.Groups))} {
		if n > maxNamed {
			return badRequest(field, "ask for all, or hold them in several operations", "are %d, more than %d", n, maxNamed)
		}
	}
	for _, name := range slices.Concat(append([][]string{r.Guests}, r.Groups...)...) {
		switch {
		case name == "":
			return badRequest("guest", "name one", "is empty")
		case len(name) > maxName:
			return badRequest("guest", "give its name or UUID", "has a name of %d bytes, more than %d", len(name), maxName)
		}
	}
	return nil
}

// checkShapes gives what is wrong with a hold's steps on any host.
func checkShapes(r maint.HoldRequest) (problems []maint.Problem) {
	for _, s := range []*maint.HostStep{&r.Step, r.Verify, r.Undo} {
		if s != nil {
			problems = append(problems, hoststep.Shape(*s)...)
		}
	}
	return problems
}

// named finds a hold's guests, and has each of them in the request once. It
// refuses what is named and cannot be held or released as was asked for.
func (a *Agent) named(what string, guests []maint.Guest, r *maint.HoldRequest) (uuids []string, err error) {
	find := func(name string) (maint.Guest, error) {
		i := slices.IndexFunc(guests, func(g maint.Guest) bool { return name == g.Name || name == g.UUID })
		if i < 0 {
			return maint.Guest{}, a.unknownGuest(what, name)
		}
		return guests[i], nil
	}
	chosen := make(map[string]bool)
	var names []string
	for _, name := range r.Guests {
		g, err := find(name)
		if err != nil {
			return nil, err
		}
		if chosen[g.UUID] {
			continue
		}
		if err := a.unlessElsewhere(what, g); err != nil {
			return nil, err
		}
		chosen[g.UUID] = true
		uuids, names = append(uuids, g.UUID), append(names, name)
	}
	group := make(map[string]int)
	var groups [][]string
	for n, members := range r.Groups {
		var once []string
		for _, name := range members {
			g, err := find(name)
			if err != nil {
				return nil, err
			}
			other, grouped := group[g.UUID]
			switch {
			case !r.All && !chosen[g.UUID]:
				return nil, refuse(what, maint.Problemf(maint.CodeBadRequest, "guest "+name, "add --guest "+name, "is in a release group but not among the guests to hold"))
			case grouped && other != n:
				return nil, refuse(what, maint.Problemf(maint.CodeBadRequest, "guest "+name, "name it once", "is in more than one release group"))
			case !grouped:
				group[g.UUID] = n
				once = append(once, name)
			}
		}
		groups = append(groups, once)
	}
	r.Guests, r.Groups = names, groups
	return uuids, nil
}
