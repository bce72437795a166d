package migrate

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"belay/agent/maint"
)

// ordinary is how much of a guest's memory is not of huge pages, bytes.
func ordinary(memory uint64, pages []maint.PageNeed) uint64 {
	for _, p := range pages {
		memory = minus(memory, p.Bytes)
	}
	return memory
}

// checkPages lists which huge pages a guest needs and this host does not have
// free. What is promised to others counts as taken, until they have begun to
// arrive: QEMU takes all its pages as it starts.
func checkPages(a maint.Arrival, room Room) []maint.Problem {
	free := make(map[cellPages]uint64) // pages
	for _, p := range room.HugePages {
		free[cellPages{p.Cell, p.PageBytes}] += p.Free
	}
	for _, r := range room.Reservations {
		if r.Op != a.Op && !active(room.Guests, r.GuestUUID) {
			take(free, r.Pages, room.HugePageBytes)
		}
	}
	var ps []maint.Problem
	for _, short := range take(free, a.Pages, room.HugePageBytes) {
		where := "has"
		if len(short.need.Cells) > 0 {
			where = fmt.Sprintf("in its NUMA cells %s it has", strings.Trim(fmt.Sprint(short.need.Cells), "[]"))
		}
		kib := short.need.PageBytes >> 10
		ps = append(ps, *maint.Problemf(maint.CodeNoPages, "host "+room.Host.Name,
			fmt.Sprintf("have more of them there (virsh allocpages %d COUNT --cellno CELL), or choose another peer", kib),
			"%s %d huge pages of %d KiB free, of which the guest needs %d", where, short.free, kib, short.need.Bytes/short.need.PageBytes))
	}
	return ps
}

func active(guests []maint.Guest, uuid string) bool {
	return slices.ContainsFunc(guests, func(g maint.Guest) bool { return g.UUID == uuid && g.State.Active() })
}

// cellPages are the huge pages of one size in one cell.
type cellPages struct {
	cell  int
	bytes uint64
}

// shortage is a need that cannot be met, and the pages that are free for it.
type shortage struct {
	need maint.PageNeed
	free uint64
}

// take meets needs out of free, those first that have the least choice, and gives
// what cannot be met.
func take(free map[cellPages]uint64, needs []maint.PageNeed, defaultBytes uint64) (short []shortage) {
	needs = slices.Clone(needs)
	choice := func(n maint.PageNeed) int {
		if len(n.Cells) == 0 {
			return math.MaxInt // any
		}
		return len(n.Cells)
	}
	slices.SortStableFunc(needs, func(a, b maint.PageNeed) int { return cmp.Compare(choice(a), choice(b)) })
	for _, n := range needs {
		n.PageBytes = cmp.Or(n.PageBytes, defaultBytes)
		if n.PageBytes == 0 {
			continue // nothing is known of this host's default
		}
		want := (n.Bytes + n.PageBytes - 1) / n.PageBytes
		left, had := want, uint64(0)
		for _, at := range slices.SortedFunc(maps.Keys(free), func(a, b cellPages) int { return cmp.Compare(a.cell, b.cell) }) {
			if at.bytes != n.PageBytes || len(n.Cells) > 0 && !slices.Contains(n.Cells, at.cell) {
				continue
			}
			had += free[at]
			some := min(left, free[at])
			free[at] -= some
			left -= some
		}
		if left > 0 {
			n.Bytes = want * n.PageBytes
			short = append(short, shortage{n, had})
		}
	}
	return short
}
