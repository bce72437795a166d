package migrate

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"belay/agent/maint"
)

func TestCheckDisks(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	raw := maint.DiskCopy{Target: "vda", Path: "/d/a", Format: "raw", Bytes: 64 * mib, Allocated: mib}
	qcow2 := maint.DiskCopy{Target: "vdb", Path: "/d/b", Format: "qcow2", Bytes: 64 * mib, Allocated: 16 * mib}
	place := func(edit func(*DiskPlace)) DiskPlace {
		p := DiskPlace{Known: true, Folder: true, Storage: 7, Free: 64 * mib}
		edit(&p)
		return p
	}
	good := place(func(*DiskPlace) {})
	for _, c := range []struct {
		name   string
		disks  []maint.DiskCopy
		place  DiskPlace
		claims Claims
		image  bool
		codes  []maint.Code
		says   string
	}{
		{"fits", []maint.DiskCopy{raw}, good, nil, true, nil, ""},
		{"a raw image may take all that it is large", []maint.DiskCopy{raw}, place(func(p *DiskPlace) { p.Free-- }), nil, true, []maint.Code{maint.CodeNoRoom}, "which take up to 64 MiB"},
		{"others have been promised some of it", []maint.DiskCopy{raw}, good, Claims{7: 1}, true, []maint.Code{maint.CodeNoRoom}, "promised"},
		{"others are on other storage", []maint.DiskCopy{raw}, good, Claims{8: 64 * mib}, true, nil, ""},
		{"a qcow2 image takes what it takes now", []maint.DiskCopy{qcow2}, place(func(p *DiskPlace) { p.Free = 18 * mib }), nil, true, nil, ""},
		{"and some more", []maint.DiskCopy{qcow2}, place(func(p *DiskPlace) { p.Free = 18*mib - 1 }), nil, true, []maint.Code{maint.CodeNoRoom}, "/d/b"},
		{"both together", []maint.DiskCopy{raw, qcow2}, place(func(p *DiskPlace) { p.Free = 81 * mib }), nil, true, []maint.Code{maint.CodeNoRoom}, "/d/a, /d/b, which take up to 82 MiB"},
		{"what of it is there already", []maint.DiskCopy{raw}, place(func(p *DiskPlace) { p.There, p.Taken, p.Free = true, 32*mib, 32*mib }), nil, true, []maint.Code{maint.CodeDiskInTheWay}, "precious (do this)"},
		{"no qemu-img", []maint.DiskCopy{raw, qcow2}, place(func(p *DiskPlace) { p.Free *= 2 }), nil, false, []maint.Code{maint.CodeDiskCopy}, "qemu-img"},
		{"no qemu-img is needed", []maint.DiskCopy{raw}, good, nil, false, nil, ""},
		{"no folder", []maint.DiskCopy{raw}, DiskPlace{Known: true}, nil, true, []maint.Code{maint.CodeDiskMissing}, "no folder for /d/a"},
		{"hangs", []maint.DiskCopy{raw}, DiskPlace{Hangs: true}, nil, true, []maint.Code{maint.CodeStorageHangs}, "/d/a"},
		{"may not look", []maint.DiskCopy{raw}, DiskPlace{}, nil, true, []maint.Code{maint.CodeDiskCopy}, "ReadWritePaths"},
		{"may not write", []maint.DiskCopy{raw}, place(func(p *DiskPlace) { p.Denied = true }), nil, true, []maint.Code{maint.CodeDiskCopy}, "ReadWritePaths"},
	} {
		places := make(map[string]DiskPlace)
		for _, d := range c.disks {
			places[d.Path] = c.place
		}
		ps := CheckDisks(c.disks, DiskChecks{Host: "b", Places: places, Claims: c.claims, QemuImg: c.image, InTheWay: func(string) (string, string) { return "precious", "do this" }})
		if d := cmp.Diff(c.codes, codes(ps)); d != "" {
			t.Errorf("%s: %s", c.name, d)
		}
		if len(ps) > 0 && (!strings.Contains(ps[0].Error(), c.says) && !strings.Contains(ps[0].Reason+" ("+ps[0].Remedy+")", c.says) || ps[0].Remedy == "") {
			t.Errorf("%s: %v", c.name, &ps[0])
		}
	}
}

// disksOf is a source and a destination as far as their disks are concerned.
type disksOf struct {
	disks []maint.GuestDisk
	same  map[string]bool
	err   error
	asked []string
}

func (d *disksOf) WrittenDisks(context.Context, string) ([]maint.GuestDisk, error) {
	return d.disks, nil
}

func (d *disksOf) CheckFiles(_ context.Context, q maint.FilesQuestion) (views []maint.FileView, err error) {
	for _, f := range q.Files {
		d.asked = append(d.asked, f.Path)
		views = append(views, maint.FileView{Path: f.Path, Same: d.same[f.Path]})
	}
	return views, d.err
}

func (d *disksOf) MakeDisks(context.Context, maint.OpID) error   { return errors.New("not now") }
func (d *disksOf) RemoveDisks(context.Context, maint.OpID) error { return errors.New("not now") }

func TestChooseCopies(t *testing.T) {
	t.Parallel()
	disk := func(target, why string) maint.GuestDisk {
		return maint.GuestDisk{Why: why, DiskCopy: maint.DiskCopy{Target: target, Path: "/d/" + target, Format: "raw", Bytes: 1}}
	}
	var files []maint.FileNeed
	for _, f := range []string{"/d/vda", "/d/vdb", "/d/vdc"} {
		files = append(files, maint.FileNeed{Path: f, Same: true})
	}
	files = append(files, maint.FileNeed{Path: "/d/base"})
	for _, c := range []struct {
		name  string
		which []string
		want  []string // copied
		rest  int
		codes []maint.Code
		asked int
	}{
		{"not said", nil, nil, 4, nil, 0},
		{"none", []string{"none"}, nil, 4, nil, 0},
		{"all", []string{"all"}, []string{"vda"}, 3, nil, 2},
		{"one", []string{"vda"}, []string{"vda"}, 3, nil, 1},
		{"a shared one", []string{"vdb"}, nil, 4, []maint.Code{maint.CodeDiskCopy}, 1},
		{"one that cannot be", []string{"vda", "vdc"}, []string{"vda"}, 3, []maint.Code{maint.CodeDiskCopy}, 1},
		{"one that is not there", []string{"vdz"}, nil, 4, []maint.Code{maint.CodeDiskCopy}, 0},
	} {
		d := &disksOf{disks: []maint.GuestDisk{disk("vda", ""), disk("vdb", ""), disk("vdc", "it is encrypted")}, same: map[string]bool{"/d/vdb": true}}
		m := &Migration{Guest: "web-1", To: "b", Disks: DiskCopying{Which: c.which, From: d, To: d}}
		rest, ps, err := m.chooseCopies(t.Context(), append([]maint.FileNeed(nil), files...))
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, k := range m.Copies() {
			got = append(got, k.Target)
		}
		if d := cmp.Diff(c.want, got); d != "" || len(rest) != c.rest {
			t.Errorf("%s: %d files left; %s", c.name, len(rest), d)
		}
		if diff := cmp.Diff(c.codes, codes(ps)); diff != "" || len(d.asked) != c.asked {
			t.Errorf("%s: asked of %v; %s", c.name, d.asked, diff)
		}
		d.err = errors.New("no route")
		if _, _, err := m.chooseCopies(t.Context(), files); (err != nil) != (c.asked > 0) {
			t.Errorf("%s: a peer that does not answer: %v", c.name, err)
		}
	}
}

func TestCopyParams(t *testing.T) {
	t.Parallel()
	one, over := maint.DiskCopy{Target: "vda"}, maint.DiskCopy{Target: "vdb", Backing: "/base"}
	for _, c := range []struct {
		copies []maint.DiskCopy
		allow  []maint.Means
		limit  uint64
		want   maint.MoveParams
	}{
		{nil, maint.AllMeans, 10, maint.MoveParams{BandwidthMiBs: 10}},
		{[]maint.DiskCopy{one}, nil, 10, maint.MoveParams{BandwidthMiBs: 10, CopyDisks: []string{"vda"}}},
		{[]maint.DiskCopy{one, over}, nil, 11, maint.MoveParams{BandwidthMiBs: 5, CopyDisks: []string{"vda", "vdb"}, CopyOverlays: true}},
		{[]maint.DiskCopy{one, over}, []maint.Means{maint.MeansSlow}, 1, maint.MoveParams{BandwidthMiBs: 1, CopyDisks: []string{"vda", "vdb"}, CopyOverlays: true, SyncWrites: true}},
		{[]maint.DiskCopy{one, over}, nil, 0, maint.MoveParams{CopyDisks: []string{"vda", "vdb"}, CopyOverlays: true}},
	} {
		m := &Migration{Allow: c.allow, Params: maint.MoveParams{BandwidthMiBs: c.limit}, copies: c.copies}
		if d := cmp.Diff(c.want, m.params(false)); d != "" {
			t.Error(d)
		}
	}
}
