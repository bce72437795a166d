package migrate

import (
	"context"
	"errors"
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"belay/agent/maint"
)

// cpu compares as it says; nil runs everything.
type cpu struct{ err error }

func (c cpu) CompareCPU(context.Context, string, string, string, string) error { return c.err }

const gib = 1 << 30

// arrival is a guest of 1 GiB that fits everywhere.
func arrival(edit func(*maint.Arrival)) maint.Arrival {
	a := maint.Arrival{Op: "mig-1", Guest: "web-1", GuestUUID: "uuid-web-1", MemoryBytes: 1 * gib, VCPUs: 1,
		Arch: "x86_64", DomainType: "kvm", MachineType: "pc-q35-7.2", CPUXML: "<cpu/>", HostUUID: "uuid-host-a"}
	if edit != nil {
		edit(&a)
	}
	return a
}

// room is a host with 16 GiB free and nothing on it.
func room(edit func(*Room)) Room {
	r := Room{Host: maint.Host{Name: "host-b", UUID: "uuid-host-b", Arch: "x86_64", MemoryBytes: 16 * gib, FreeMemoryBytes: 16 * gib,
		QEMUVersion: "7.2.9", DomainTypes: []string{"kvm", "qemu"}, MachineTypes: []string{"pc-q35-7.2"}}}
	if edit != nil {
		edit(&r)
	}
	return r
}

func codes(ps []maint.Problem) (cs []maint.Code) {
	for _, p := range ps {
		cs = append(cs, p.Code)
	}
	return cs
}

func TestCheckArrival(t *testing.T) {
	t.Parallel()
	guest := func(uuid, name string, s maint.GuestState) func(*Room) {
		return func(r *Room) { r.Guests = []maint.Guest{{UUID: uuid, Name: name, State: s, MemoryBytes: gib}} }
	}
	expects := func(op maint.OpID, uuid, name string) func(*Room) {
		return func(r *Room) {
			r.Reservations = []maint.Reservation{{Op: op, From: "host-c", GuestUUID: uuid, Guest: name, MemoryBytes: gib}}
		}
	}
	for _, c := range []struct {
		name    string
		arrival func(*maint.Arrival)
		room    func(*Room)
		cpu     error
		want    maint.Code // "" for none
		text    string
	}{
		{"welcome", nil, nil, nil, "", ""},
		{"same host UUID", nil, func(r *Room) { r.Host.UUID = "uuid-host-a" }, nil, maint.CodeSameHost, "same libvirt host UUID"},
		{"source's host UUID is not known", func(a *maint.Arrival) { a.HostUUID = "" }, func(r *Room) { r.Host.UUID = "" }, nil, "", ""},
		{"runs here", nil, guest("uuid-web-1", "web-1", maint.GuestRunning), nil, maint.CodeNameTaken, "already has guest web-1 with this UUID, state running"},
		{"is paused here", nil, guest("uuid-web-1", "web-1", maint.GuestPaused), nil, maint.CodeNameTaken, "state paused"},
		{"is defined here", nil, guest("uuid-web-1", "web-1", maint.GuestShutoff), nil, maint.CodeNameTaken, "inactive definition of guest web-1"},
		{"another of that name", nil, guest("uuid-other", "web-1", maint.GuestShutoff), nil, maint.CodeNameTaken, "another guest named web-1 (UUID uuid-other)"},
		{"another guest", nil, guest("uuid-other", "web-2", maint.GuestRunning), nil, "", ""},
		{"expected from elsewhere", nil, expects("mig-2", "uuid-web-1", "web-1"), nil, maint.CodeBusy, "already expects guest web-1 from host-c (operation mig-2)"},
		{"its name is expected", nil, expects("mig-2", "uuid-other", "web-1"), nil, maint.CodeBusy, "already expects guest web-1"},
		{"its own reservation", nil, expects("mig-1", "uuid-web-1", "web-1"), nil, "", ""},
		{"another is expected", nil, expects("mig-2", "uuid-other", "web-2"), nil, "", ""},
		{"architecture", func(a *maint.Arrival) { a.Arch = "aarch64" }, nil, nil, maint.CodeDomainType, "is x86_64, the guest needs aarch64"},
		{"no KVM", nil, func(r *Room) { r.Host.DomainTypes = []string{"qemu"} }, nil, maint.CodeDomainType, `cannot run "kvm" guests, only qemu`},
		{"machine type", func(a *maint.Arrival) { a.MachineType = "pc-q35-9.0" }, nil, nil, maint.CodeMachineType, "its QEMU 7.2.9 has no machine type pc-q35-9.0"},
		{"CPU", nil, nil, errors.New("no avx512"), maint.CodeCPU, "cannot run the guest's CPU: no avx512"},
		{"no CPU to compare", func(a *maint.Arrival) { a.CPUXML = "" }, nil, errors.New("no avx512"), "", ""},
		{"free memory", nil, func(r *Room) { r.Host.FreeMemoryBytes = gib }, nil, maint.CodeNoRoom, "has 1024 MiB free for guests, the guest needs 1152 MiB"},
		{"limit", nil, func(r *Room) { r.MemoryLimit = gib }, nil, maint.CodeNoRoom, "limits.guest_memory of 1024 MiB leaves 1024 MiB"},
	} {
		ps := CheckArrival(t.Context(), arrival(c.arrival), room(c.room), cpu{c.cpu})
		wantOne(t, c.name, ps, c.want, c.text)
	}
}

// wantOne checks that host-b has just one problem, with that code and text; "" is for
// none.
func wantOne(t *testing.T, name string, ps []maint.Problem, code maint.Code, text string) {
	t.Helper()
	var want []maint.Code
	if code != "" {
		want = []maint.Code{code}
	}
	if d := cmp.Diff(want, codes(ps)); d != "" {
		t.Errorf("%s: %s", name, d)
		return
	}
	for _, p := range ps {
		if p.Subject != "host host-b" || !strings.Contains(p.Reason, text) || p.Remedy == "" {
			t.Errorf("%s: %+v", name, p)
		}
	}
}

func TestCheckArrivalListsEverything(t *testing.T) {
	t.Parallel()
	ps := CheckArrival(t.Context(),
		arrival(func(a *maint.Arrival) { a.Arch, a.DomainType, a.MachineType = "aarch64", "xen", "virt" }),
		Room{Host: maint.Host{Name: "host-b", UUID: "uuid-host-a", Arch: "x86_64"}, MemoryLimit: 1,
			Guests:       []maint.Guest{{UUID: "uuid-web-1", Name: "old"}, {UUID: "uuid-other", Name: "web-1"}},
			Reservations: []maint.Reservation{{Op: "mig-2", GuestUUID: "uuid-web-1"}}},
		cpu{errors.New("no")})
	want := []maint.Code{maint.CodeSameHost, maint.CodeNameTaken, maint.CodeNameTaken, maint.CodeBusy, maint.CodeDomainType,
		maint.CodeDomainType, maint.CodeMachineType, maint.CodeCPU, maint.CodeNoRoom, maint.CodeNoRoom}
	if d := cmp.Diff(want, codes(ps)); d != "" {
		t.Error(d)
	}
}

func TestMemory(t *testing.T) {
	t.Parallel()
	const each = gib + overhead // what the arrival, or another like it, takes
	promised := func(op maint.OpID, uuid string) maint.Reservation {
		return maint.Reservation{Op: op, GuestUUID: uuid, Guest: uuid, MemoryBytes: gib}
	}
	guest := func(uuid string, s maint.GuestState) maint.Guest {
		return maint.Guest{UUID: uuid, Name: uuid, State: s, MemoryBytes: gib}
	}
	for _, c := range []struct {
		name string
		room Room // Host's FreeMemoryBytes is free
		free uint64
		fits bool
	}{
		{"just", Room{}, each, true},
		{"a byte short", Room{}, each - 1, false},
		{"no memory at all", Room{}, 0, false},
		{"the host keeps some", Room{MemoryReserve: 1}, each, false},
		{"the host keeps more than it has", Room{MemoryReserve: math.MaxUint64 / 2}, each, false},
		{"another is promised room", Room{Reservations: []maint.Reservation{promised("mig-2", "x")}}, 2*each - 1, false},
		{"room for both", Room{Reservations: []maint.Reservation{promised("mig-2", "x")}}, 2 * each, true},
		{"its own promise", Room{Reservations: []maint.Reservation{promised("mig-1", "uuid-web-1")}}, each, true},
		{"the promised one has arrived", Room{Reservations: []maint.Reservation{promised("mig-2", "x")},
			Guests: []maint.Guest{guest("x", maint.GuestRunning)}}, each, true},
		{"the promised one is on its way", Room{Reservations: []maint.Reservation{promised("mig-2", "x")},
			Guests: []maint.Guest{guest("x", maint.GuestPaused)}}, each, false},
		{"limit, empty host", Room{MemoryLimit: each}, 99 * gib, true},
		{"limit, a byte short", Room{MemoryLimit: each - 1}, 99 * gib, false},
		{"limit, running guests count", Room{MemoryLimit: 2*each - 1, Guests: []maint.Guest{guest("x", maint.GuestRunning)}}, 99 * gib, false},
		{"limit, paused guests count", Room{MemoryLimit: 2*each - 1, Guests: []maint.Guest{guest("x", maint.GuestPaused)}}, 99 * gib, false},
		{"limit, inactive ones do not", Room{MemoryLimit: each, Guests: []maint.Guest{guest("x", maint.GuestShutoff)}}, 99 * gib, true},
		{"limit, promises count", Room{MemoryLimit: 2*each - 1, Reservations: []maint.Reservation{promised("mig-2", "x")}}, 99 * gib, false},
		{"limit, who has arrived counts once", Room{MemoryLimit: 2 * each, Reservations: []maint.Reservation{promised("mig-2", "x")},
			Guests: []maint.Guest{guest("x", maint.GuestRunning)}}, 99 * gib, true},
		{"limit, who is arriving counts once", Room{MemoryLimit: 2 * each, Reservations: []maint.Reservation{promised("mig-2", "x")},
			Guests: []maint.Guest{guest("x", maint.GuestPaused)}}, 99 * gib, true},
	} {
		r := room(nil)
		r.Host.FreeMemoryBytes = c.free
		r.Guests, r.Reservations, r.MemoryLimit, r.MemoryReserve = c.room.Guests, c.room.Reservations, c.room.MemoryLimit, c.room.MemoryReserve
		ps := CheckArrival(t.Context(), arrival(nil), r, cpu{})
		if fits := len(ps) == 0; fits != c.fits {
			t.Errorf("%s: fits is %t: %v", c.name, fits, ps)
		}
		for _, p := range ps {
			if p.Code != maint.CodeNoRoom {
				t.Errorf("%s: %+v", c.name, p)
			}
		}
	}
}

// TestMemoryNeverWraps: whatever numbers hosts and peers give, a guest that is
// let in has its memory among what is free.
func TestMemoryNeverWraps(t *testing.T) {
	t.Parallel()
	size := rapid.OneOf(rapid.Uint64Range(0, 64*gib), rapid.Just[uint64](math.MaxUint64), rapid.Just[uint64](1<<50), rapid.Uint64())
	rapid.Check(t, func(t *rapid.T) {
		r := room(nil)
		r.Host.FreeMemoryBytes, r.MemoryReserve, r.MemoryLimit = size.Draw(t, "free"), size.Draw(t, "reserve"), size.Draw(t, "limit")
		for range rapid.IntRange(0, 3).Draw(t, "promises") {
			r.Reservations = append(r.Reservations, maint.Reservation{Op: "other", GuestUUID: "x", Guest: "x", MemoryBytes: size.Draw(t, "promised")})
		}
		for range rapid.IntRange(0, 2).Draw(t, "guests") {
			r.Guests = append(r.Guests, maint.Guest{UUID: "y", Name: "y", State: maint.GuestRunning, MemoryBytes: size.Draw(t, "guest")})
		}
		a := arrival(func(a *maint.Arrival) { a.MemoryBytes = size.Draw(t, "needed") })
		if len(CheckArrival(context.Background(), a, r, cpu{})) > 0 {
			return // refusing is always safe
		}
		claims := []uint64{a.MemoryBytes, r.MemoryReserve}
		limited := []uint64{a.MemoryBytes}
		for _, p := range r.Reservations {
			claims, limited = append(claims, p.MemoryBytes), append(limited, p.MemoryBytes)
		}
		for _, g := range r.Guests {
			limited = append(limited, g.MemoryBytes)
		}
		if !fit(r.Host.FreeMemoryBytes, claims) {
			t.Fatalf("let in with %d free for %v", r.Host.FreeMemoryBytes, claims)
		}
		if r.MemoryLimit > 0 && !fit(r.MemoryLimit, limited) {
			t.Fatalf("let in with a limit of %d for %v", r.MemoryLimit, limited)
		}
	})
}

// fit says that all claims together are at most total, without adding.
func fit(total uint64, claims []uint64) bool {
	for _, c := range claims {
		if c > total {
			return false
		}
		total -= c
	}
	return true
}
