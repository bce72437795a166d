package maint

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"
)

// TestArrivalsThatCannotBeMeant: a peer's word is bounded before it is acted on.
func TestArrivalsThatCannotBeMeant(t *testing.T) {
	t.Parallel()
	good := func() Arrival {
		return Arrival{Op: "mig-1", Guest: "web-1", GuestUUID: strings.Repeat("u", 36), MemoryBytes: 1 << 30, DomainType: "kvm",
			Pages: []PageNeed{{PageBytes: 2 << 20, Bytes: 1 << 30, Cells: []int{0, 1}}},
			Needs: &Needs{
				Files:    []FileNeed{{For: "disk vda", Path: "/srv/web 1.qcow2", Kind: FileRegular, Mark: ".belay-" + strings.Repeat("0f", 16)}},
				Networks: []string{"default"},
				Pools:    []string{"fast"},
				Links:    []LinkNeed{{For: "interface a", Name: "br0.7"}},
				PCI:      []string{"0000:3b:02.1"},
				Secrets:  []SecretNeed{{For: "disk vda", UUID: "u"}},
				Sockets:  []SocketNeed{{For: "serial", Path: "/run/x"}},
				Ports:    []PortNeed{{For: "graphics vnc", Address: netip.IPv4Unspecified(), Port: 5900}},
			}}
	}
	if err := good().Validate(); err != nil {
		t.Fatal(err)
	}
	many := func(n int) (fs []FileNeed) {
		for range n {
			fs = append(fs, FileNeed{For: "disk vda", Path: "/a", Kind: FileRegular})
		}
		return fs
	}
	a := good()
	a.Needs.Files = many(maxNeeds)
	if err := a.Validate(); err != nil {
		t.Errorf("as many files as may be: %v", err)
	}
	for what, edit := range map[string]func(*Arrival){
		"too many files":           func(a *Arrival) { a.Needs.Files = many(maxNeeds + 1) },
		"a relative path":          func(a *Arrival) { a.Needs.Files[0].Path = "etc/shadow" },
		"a path that climbs":       func(a *Arrival) { a.Needs.Files[0].Path = "/srv/../etc/shadow" },
		"a path with a newline":    func(a *Arrival) { a.Needs.Files[0].Path = "/srv/a\nb" },
		"a long path":              func(a *Arrival) { a.Needs.Files[0].Path = "/" + strings.Repeat("x", 4096) },
		"an unknown kind":          func(a *Arrival) { a.Needs.Files[0].Kind = "socket" },
		"a mark elsewhere":         func(a *Arrival) { a.Needs.Files[0].Mark = ".belay-/" + strings.Repeat("0", 31) },
		"a mark of any name":       func(a *Arrival) { a.Needs.Files[0].Mark = "shadow" },
		"what it is for":           func(a *Arrival) { a.Needs.Files[0].For = "\x1b[2J" },
		"an empty network":         func(a *Arrival) { a.Needs.Networks[0] = "" },
		"a pool with a newline":    func(a *Arrival) { a.Needs.Pools[0] = "a\nb" },
		"a link that is a path":    func(a *Arrival) { a.Needs.Links[0].Name = "../x" },
		"a link that is a folder":  func(a *Arrival) { a.Needs.Links[0].Name = ".." },
		"a link of 16 bytes":       func(a *Arrival) { a.Needs.Links[0].Name = strings.Repeat("x", 16) },
		"a PCI address":            func(a *Arrival) { a.Needs.PCI[0] = "../../x" },
		"a secret without a name":  func(a *Arrival) { a.Needs.Secrets[0].UUID = "" },
		"a secret of two names":    func(a *Arrival) { a.Needs.Secrets[0].Usage = "x" },
		"a relative socket":        func(a *Arrival) { a.Needs.Sockets[0].Path = "x" },
		"a port without address":   func(a *Arrival) { a.Needs.Ports[0].Address = netip.Addr{} },
		"a port in a zone":         func(a *Arrival) { a.Needs.Ports[0].Address = netip.MustParseAddr("fe80::1%eth0") },
		"no bytes in pages":        func(a *Arrival) { a.Pages[0].Bytes = 0 },
		"too many bytes in pages":  func(a *Arrival) { a.Pages[0].Bytes = 1 << 60 },
		"a cell below 0":           func(a *Arrival) { a.Pages[0].Cells[0] = -1 },
		"a cell that nobody has":   func(a *Arrival) { a.Pages[0].Cells[0] = 1 << 20 },
		"too many sorts of pages":  func(a *Arrival) { a.Pages = make([]PageNeed, maxNeeds+1) },
		"too many cells of a kind": func(a *Arrival) { a.Pages[0].Cells = make([]int, 1<<12) },
	} {
		a := good()
		edit(&a)
		var p *Problem
		if err := a.Validate(); err == nil {
			t.Errorf("%s is taken", what)
		} else if p = AsProblem(err, "", ""); p.Code != CodeBadRequest || len(p.Reason) > 300 {
			t.Errorf("%s: %+v", what, p)
		}
	}
}

// TestEmpty: whatever a guest needs is sent.
func TestEmpty(t *testing.T) {
	t.Parallel()
	if !(Needs{}).Empty() {
		t.Error("nothing is not empty")
	}
	sorts := reflect.TypeFor[Needs]()
	for i := range sorts.NumField() {
		var n Needs
		switch f := reflect.ValueOf(&n).Elem().Field(i); f.Kind() {
		case reflect.Slice:
			f.Set(reflect.MakeSlice(f.Type(), 1, 1))
		case reflect.Bool:
			f.SetBool(true)
		}
		if n.Empty() {
			t.Errorf("needs with %s are empty", sorts.Field(i).Name)
		}
	}
}
