package plan_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"belay/agent/maint"
	"belay/agent/plan"
)

func aPlan() maint.Plan {
	for _, s := range situations() {
		if s.name == "mixed" {
			return plan.Make(s.update, s.ladder, s.options)
		}
	}
	panic("there is no situation mixed")
}

// TestTamperedIsRefused: no byte of a saved plan can be another, or missing.
func TestTamperedIsRefused(t *testing.T) {
	t.Parallel()
	text := aPlan().Encode()
	refused := func(what string, b []byte) {
		t.Helper()
		var p *maint.Problem
		if _, err := maint.DecodePlan("p.json", b); !errors.As(err, &p) || p.Code != maint.CodeTampered || p.Remedy == "" {
			t.Errorf("%s: %v", what, err)
		}
	}
	for i := range text {
		other := bytes.Clone(text)
		other[i] ^= 1
		refused("another byte", other)
	}
	refused("cut", text[:len(text)/2])
	refused("more", append(bytes.Clone(text), text...))
	refused("a space more", append(bytes.Clone(text), ' '))
	refused("nothing", nil)
	refused("another field", bytes.Replace(text, []byte(`"world"`), []byte(`"wrold"`), 1))
	p := aPlan()
	p.Version++
	refused("another version", p.Seal().Encode())
}

// FuzzDecodePlan: what is read is written as it was.
func FuzzDecodePlan(f *testing.F) {
	f.Add(aPlan().Encode())
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := maint.DecodePlan("p.json", b)
		if err == nil && !bytes.Equal(p.Encode(), b) {
			t.Errorf("%q is written as %q", b, p.Encode())
		}
		_ = p.Text()
	})
}

// FuzzSealedPlan: whatever is in a plan whose hash is right, it is read as it was written, and
// can be shown and compared.
func FuzzSealedPlan(f *testing.F) {
	was := aPlan()
	f.Add(was.Encode())
	f.Add([]byte(`{"guests":[{"guest":"web-1","feels":["B1"],"pause":{}}],"steps":[{"n":1,"kind":"hold"},{"kind":"move"}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var p maint.Plan
		if json.Unmarshal(b, &p) != nil {
			return
		}
		p.Version = maint.PlanVersion
		text := p.Seal().Encode()
		got, err := maint.DecodePlan("p.json", text)
		if err != nil || !bytes.Equal(got.Encode(), text) {
			t.Fatalf("%v: %s is read as %s", err, text, got.Encode())
		}
		_ = got.Text()
		_, _ = maint.PlanDiff(was, got), maint.PlanDiff(got, was)
	})
}

// TestDiff: what differs for somebody is said, a line each.
func TestDiff(t *testing.T) {
	t.Parallel()
	u := update("ovs", maint.UrgencyNormal, change("ovs", maint.ChangeService, B1, D))
	was := plan.Make(u, ladder(u, guest("web-1"), guest("web-2"), guest("web-3"), peer("host-b", 64*gib)), maint.PlanOptions{})
	for name, c := range map[string]struct {
		is   maint.Ladder
		want []string
	}{
		"nothing": {ladder(u, guest("web-1"), guest("web-2"), guest("web-3"), peer("host-b", 63*gib)), nil},
		"another rung": {ladder(u, guest("web-1"), guest("web-2"), guest("web-3", refuses(B1)), peer("host-b", 64*gib)),
			[]string{"guest web-3: was B1, is D to host-b"}},
		"a guest less, one blocked": {ladder(u, guest("web-1", refuses("B", D)), guest("web-2"), peer("host-b", 64*gib)),
			[]string{"guest web-1: was B1, is none", "guest web-1 begins: was 2026-12-01 10:15Z (in 15m), is -", "guest web-3: does not run here any more",
				"blocked by: guest web-1: no rung serves it"}},
		"later": {ladder(u, guest("web-1"), guest("web-2"), guest("web-3", nightly(22)), peer("host-b", 64*gib)),
			[]string{"guest web-1 begins: was 2026-12-01 10:15Z (in 15m), is 2026-12-01 22:00Z", "guest web-2 begins", "guest web-3: was B1, is C, then B1", "guest web-3 begins"}},
		"longer": {ladder(u, guest("web-1"), guest("web-2"), guest("web-3"), peer("host-b", 64*gib),
			[]maint.Felt{{Rung: B1, UUID: "x", At: now.Add(-time.Hour), Pause: time.Minute, Work: time.Minute, Step: "restart ovs.service"}}),
			[]string{"guest web-1: felt pause 3.15s", "guest web-2: felt", "guest web-3: felt"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			lines := maint.PlanDiff(was, plan.Make(u, c.is, maint.PlanOptions{}))
			if !slices.EqualFunc(lines, c.want, strings.HasPrefix) {
				t.Error(cmp.Diff(c.want, lines))
			}
		})
	}
	other := update("ovs", maint.UrgencySecurity, change("qemu", maint.ChangeQEMU, B2, D))
	lines := maint.PlanDiff(was, plan.Make(other, ladder(other), maint.PlanOptions{}))
	want := []string{"urgency: was normal, is security", "change qemu: is new, by B2", "change ovs: is no more", "guest web-1: does", "guest web-2: does", "guest web-3: does"}
	if !slices.EqualFunc(lines, want, strings.HasPrefix) {
		t.Error(cmp.Diff(want, lines))
	}
}
