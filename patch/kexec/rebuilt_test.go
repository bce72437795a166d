package kexec_test

import (
	"slices"
	"strings"
	"testing"

	"belay/agent/maint"
	"belay/patch/kexec"
	"belay/patch/kexec/kexectest"
)

// spoilManifest has the manifest not be what was written.
func (b *bed) spoilManifest() { b.m.Write(kexec.DefaultDir+"/manifest.json", "{}") }

// What is kept of a guest whose memory is in place tells all of that itself: without the manifest it is
// restored, once, by the journal's plan or without; a guest that is copied has its checksum there only.
func TestManifestDamaged(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		spoil  func(b *bed)
		rescue bool
	}{
		"by its plan":            {(*bed).spoilManifest, false},
		"by what is there":       {(*bed).spoilManifest, true},
		"gone, by its plan":      {func(b *bed) { b.m.Remove(kexec.DefaultDir + "/manifest.json") }, false},
		"gone, by what is there": {func(b *bed) { b.m.Remove(kexec.DefaultDir + "/manifest.json") }, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newInPlaceBed(t)
			copied := b.h.PutGuest("web-2", func(g *maint.Guest) { g.MemoryBytes = 1 << 20 })
			if err := b.h.SetAutostart(t.Context(), b.uuid, true); err != nil {
				t.Fatal(err)
			}
			b.save()
			c.spoil(b)
			next := *b.Job
			next.Op = "kexec-2"
			if err := next.Save(t.Context(), b.s); err == nil || !b.has(".save") {
				t.Errorf("another operation: %v; what was saved is there: %v", err, b.has(".save"))
			}
			var guests []maint.KexecGuest
			b.Record = func(r maint.KexecResult) error { guests = r.Guests; return nil }
			for range 3 {
				if c.rescue {
					var err error
					if guests, err = b.rescue(); err != nil {
						t.Fatal(err)
					}
				} else if _, err := b.Back(t.Context(), b.s); err == nil {
					t.Error("all is well")
				}
				if len(guests) != 2 {
					t.Fatalf("%+v", guests)
				}
				for _, g := range guests {
					switch g.UUID {
					case b.uuid:
						if g.Fate != maint.KexecRestored || g.Memory != maint.KexecInPlace || g.Guest != "ram-1" || g.SameBoot == nil || !*g.SameBoot {
							t.Errorf("%+v, %v", g, g.Problem)
						}
					case copied:
						if g.Fate != maint.KexecKept || g.Guest != "web-2" || !strings.Contains(g.Problem.Remedy, "virsh restore "+kexec.DefaultDir+"/"+copied+".save") {
							t.Errorf("%+v, %v", g, g.Problem)
						}
					}
				}
				b.whole()
				if !b.autostart() {
					t.Error("its autostart is off")
				}
			}
			// The one that is kept is in the way of another operation, which would remove it.
			b.Op = "kexec-2"
			b.m.Boots(kexectest.Old)
			if v, err := b.Plan(t.Context()); err != nil || !slices.ContainsFunc(v.Problems, func(p maint.Problem) bool {
				return p.Code == maint.CodeKeptGuest && strings.HasPrefix(p.Remedy, "belayd -restore")
			}) {
				t.Errorf("%+v, %v", v.Problems, err)
			}
			b.m.Remove(kexec.DefaultDir + "/" + copied + ".save")
			if v, err := b.Plan(t.Context()); err != nil || len(v.Problems) > 0 {
				t.Errorf("%+v, %v", v.Problems, err)
			}
		})
	}
}

// A manifest that is damaged later than a guest's restore has begun, which its mark tells.
func TestManifestDamagedWithinRestore(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		at    string
		boots bool
		want  maint.KexecFate
	}{
		"in its new QEMU":                   {"after CreatePaused", false, maint.KexecRestored},
		"about to run":                      {"Resume", false, maint.KexecRestored},
		"in its new QEMU, and another boot": {"after CreatePaused", true, maint.KexecRestored},
		"about to run, and another boot":    {"Resume", true, maint.KexecLost},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newInPlaceBed(t)
			b.save()
			b.dies(c.at, func() { _, _ = b.Rescue(t.Context()) })
			b.spoilManifest()
			if c.boots {
				b.h.Reboot()
				b.m.Boots(kexectest.Old)
			}
			if g := b.mustRescue(); g.Fate != c.want {
				t.Errorf("%+v, %v", g, g.Problem)
			}
			if c.want == maint.KexecRestored {
				b.whole()
			}
		})
	}
}

// Without the manifest, too, memory does not go with state that is damaged, or with that of another time.
func TestManifestDamagedAndMore(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(b *bed){
		"its state":  func(b *bed) { b.m.Spoil(b.uuid) },
		"its memory": func(b *bed) { b.m.SpoilMemory(b.uuid) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newInPlaceBed(t)
			b.save()
			spoil(b)
			b.spoilManifest()
			if g := b.mustRescue(); g.Guest != "ram-1" || g.Fate != maint.KexecLost && g.Fate != maint.KexecKept || b.state() != maint.GuestShutoff {
				t.Errorf("%+v, %v", g, g.Problem)
			}
		})
	}
}
