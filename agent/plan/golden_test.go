package plan_test

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"belay/agent/maint"
	"belay/agent/plan"
)

var write = flag.Bool("update", false, "write the golden files anew")

// A, B1, ... are the rungs in situations.
const (
	A  = maint.RungA
	B1 = maint.RungB1
	B2 = maint.RungB2
	B3 = maint.RungB3
	D  = maint.RungD
)

func situations() []situation {
	const normal, security, emergency = maint.UrgencyNormal, maint.UrgencySecurity, maint.UrgencyEmergency
	var all []situation
	add := func(name, about string, u maint.Update, l maint.Ladder, o ...maint.PlanOptions) {
		all = append(all, situation{name, about, u, l, append(o, maint.PlanOptions{})[0]})
	}
	back := maint.PlanOptions{Return: true}

	u := update("cve-livepatch", security, change("fix", maint.ChangeLivepatch, A))
	add("livepatch", "A livepatch is loaded into the running kernel: nobody feels it, nobody is told.", u, ladder(u, guest("web-1"), guest("web-2")))
	add("livepatch-refused", "The kernel cannot be reached, and there is no other way to deliver a livepatch.", u, ladder(u, guest("web-1"),
		cannot("fix", A, maint.CodeNoHelper, "kernel", "belay-kernel does not answer", "systemctl start belay-kernel.socket")))

	u = update("microcode", normal, change("ucode", maint.ChangeMicrocode, A, B3, D))
	u.Changes[0].Kernel, u.Changes[0].Initrd = "/boot/vmlinuz", "/boot/initrd.img"
	late := cannot("ucode", A, maint.CodeNeedsReboot, "CPU microcode", "this kernel loads none late", "put it into the initrd, and use rung B3 or D")
	add("microcode-late", "The kernel loads microcode while it runs.", u, ladder(u, guest("web-1")))
	add("microcode-early", "It does not: the host boots, with its guests kept in memory.", u, ladder(u, guest("web-1"), late))

	u = update("libvirt", normal, change("virtlogd", maint.ChangeService, A, B1, D))
	add("component-untouched", "A component that guests do not touch is restarted under them.", u, ladder(u, guest("web-1"), guest("db-1")))

	u = update("ovs", normal, change("openvswitch-switch", maint.ChangeService, B1, D))
	add("hold-all", "Guests are held while a component is restarted. Those that do not run are not concerned.", u,
		ladder(u, guest("web-1"), guest("web-2"), peer("host-b", 64*gib), "old-1"))
	add("hold-too-long-for-one", "One of them may not stand still for as long as that can take, and moves away before.", u,
		ladder(u, guest("web-1"), guest("voip-1", maxPause(time.Second)), peer("host-b", 64*gib)), back)
	add("hold-refused", "One refuses to be held and has nowhere to go. Nothing is begun; what would help is listed.", u,
		ladder(u, guest("web-1"), guest("voip-1", refuses("B"))))
	short := ladder(u, guest("web-1"), peer("host-b", 64*gib))
	short.MaxHold = 5 * time.Second
	add("hold-too-long-for-host", "The host holds nobody for as long as that can take: the leash would release them half way.", u, short)
	add("hold-paused-guest", "Somebody has paused a guest. It is left alone, and feels nothing.", u,
		ladder(u, guest("web-1"), guest("debug-1", untouched(B1, "somebody has paused it"))))
	add("prefers-move", "The owner of one would rather have it moved than held.", u,
		ladder(u, guest("web-1"), guest("voip-1", prefers(D)), peer("host-b", 64*gib)))
	add("prefers-move-no-room", "There is no room for it: it is held after all, as its policy does not refuse that.", u,
		ladder(u, guest("web-1"), guest("voip-1", prefers(D)), peer("host-b", 2*gib)))
	add("windows-in-common", "Guests with windows are held together, at the first moment that suits all.", u,
		ladder(u, guest("web-1"), guest("shop-1", nightly(22)), guest("shop-2", nightly(1))))
	add("windows-apart", "No moment suits both: they are held at the deadline.", u,
		ladder(u, guest("shop-1", nightly(20)), guest("shop-2", nightly(1))))
	add("no-notice-to-be-had", "A policy asks for notice, and this host does not tell its guests of anything.", u,
		ladder(u, guest("web-1", policy(func(p *maint.GuestPolicy) { p.Notice = 0 })), guest("db-1"), false))

	u.Urgency = security
	add("security", "It closes a hole: a guest has less notice, where its policy says so.", u,
		ladder(u, guest("web-1", policy(func(p *maint.GuestPolicy) { p.Notice, p.SecurityNotice = 48*time.Hour, time.Hour }))))
	u.Urgency = emergency
	add("emergency", "Nobody is waited for: no notice, no windows, no questions. What is refused stays refused.", u,
		ladder(u, guest("web-1", nightly(22)), guest("db-1", asks("B")), guest("voip-1", refuses("B")), peer("host-b", 64*gib)))

	u = update("qemu-10", normal, change("qemu", maint.ChangeQEMU, B2, D))
	u.Changes[0].Prepare = command(20*time.Second, "apt-get", "install", "-y", "qemu-system-x86")
	u.Changes[0].Undo = command(0, "apt-get", "install", "-y", "--allow-downgrades", "qemu-system-x86=1:7.2")
	add("qemu", "Each guest gets its new QEMU by the cheapest method that is possible for it. One has it already.", u,
		ladder(u, guest("web-1"), guest("big-1", size(64*gib), method(maint.VMMPrewarmed, 40*time.Millisecond)), guest("new-1", untouched(B2, "runs in QEMU 10.0.2 already"))))
	device := not(B2, maint.CodeDevice, "detach it, or shut it down and start it again", "has host device 0000:3b:00.0, which one QEMU cannot hand to another")
	stays := not(D, maint.CodeHostDevice, "detach it", "has host device 0000:3b:00.0, which cannot go along")
	add("qemu-passthrough", "One has a device of the host's: neither a new QEMU nor a move is possible for it. The others need not wait for it.", u,
		ladder(u, guest("web-1"), guest("gpu-1", device, stays), peer("host-b", 64*gib)))
	add("qemu-windows", "Rung C: each owner has a window, and each guest gets its QEMU in its own.", u,
		ladder(u, guest("web-1"), guest("shop-1", nightly(22)), guest("shop-2", nightly(1))))

	u = update("kernel-6.12", security, change("kernel", maint.ChangeKernel, B3, D))
	u.Covers = []string{"CVE-2026-1234"}
	no3 := not(B3, maint.CodeVolatile, "put it on a disk", "disk vdb is in memory, and would not outlive the boot")
	region := cannot("kernel", B3, maint.CodeNoRegion, "host host-a", "keeps no memory over a boot", "reserve some: see docs/rung-b-kexec.md")
	add("kernel", "Another kernel under all guests, which stand still as long as it boots.", u, ladder(u, guest("web-1"), guest("db-1")))
	add("kernel-one-moves", "One guest cannot be kept over a boot, and moves away for that time.", u,
		ladder(u, guest("web-1"), guest("scratch-1", no3), peer("host-b", 64*gib)), back)
	add("kernel-no-region", "The host has no memory that outlives a boot: it is emptied, boots, and gets its guests back.", u,
		ladder(u, guest("web-1"), guest("db-1"), region, peer("host-b", 64*gib)), back)

	u = update("kernel-and-qemu", normal, change("kernel", maint.ChangeKernel, B3, D), change("qemu", maint.ChangeQEMU, B2, B3, D), change("openvswitch-switch", maint.ChangeService, B1, B3, D))
	add("one-pause-for-three", "The boot that the kernel needs delivers the other changes too: one pause, not three.", u, ladder(u, guest("web-1")))

	u = update("firmware", normal, change("bmc", maint.ChangeFirmware, D))
	u.Changes[0].Apply, u.Changes[0].Reboot = command(5*time.Minute, "fwupdmgr", "update", "-y"), true
	add("firmware", "Firmware wants an empty host.", u, ladder(u, guest("web-1"), guest("db-1"), peer("host-b", 64*gib)), back)
	add("firmware-no-room", "There is not enough room on the peers. Who has the higher priority is placed; nothing is begun as long as one is left.", u,
		ladder(u, guest("web-1", size(8*gib)), guest("db-1", size(4*gib), priority(10)), peer("host-b", 10*gib)))
	add("firmware-tight", "All fit, but not by filling the roomiest or the tightest peer first.", u,
		ladder(u, guest("a", size(6*gib)), guest("b", size(5*gib)), guest("c", size(5*gib)), guest("d", size(4*gib)), guest("e", size(4*gib)), guest("f", size(4*gib)),
			peer("host-b", 14*gib), peer("host-c", 14*gib)))
	add("firmware-anti-affinity", "Two of one group are not to be on one host, and one of the peers has a third.", u,
		ladder(u, guest("db-1", apart("db")), guest("db-2", apart("db")), guest("web-1"), peer("host-b", 64*gib), peer("host-c", 16*gib),
			maint.LadderPeer{Name: "host-d", Room: maint.PeerRoom{FreeBytes: 128 * gib, In: 4, Out: 4, AntiAffinity: map[string]string{"db": "db-3"}}}))
	add("firmware-to-some", "The operator names the peers. One guest cannot go to any of them.", u,
		ladder(u, guest("web-1"), guest("old-1", notTo("host-b", maint.CodeCPU, "its CPU lacks avx512f, which the guest has")), peer("host-b", 64*gib), peer("host-c", 64*gib)),
		maint.PlanOptions{To: []string{"host-b"}})
	add("blackout-limit", "Moves have lately been slower than a guest's policy allows.", u,
		ladder(u, guest("voip-1", policy(func(p *maint.GuestPolicy) { p.MaxBlackout = 200 * time.Millisecond })), peer("host-b", 64*gib),
			felt(D, "", 9, 180*time.Millisecond, 190*time.Millisecond, 240*time.Millisecond, 170*time.Millisecond, 200*time.Millisecond, 230*time.Millisecond)))
	add("empty-host", "There is nobody who could feel anything.", u, ladder(u, "old-1", peer("host-b", gib)))

	u = update("retire", normal, change("retire", maint.ChangeLeave, D))
	u.Within = 48 * time.Hour
	add("host-leaves", "The host goes out of service. One guest may not move unless its owner approves, or the time is up: rung C.", u,
		ladder(u, guest("web-1"), guest("shop-1", asks(D)), peer("host-b", 64*gib)))
	add("host-leaves-refused", "One guest may not move at all: its owner has to be spoken to.", u,
		ladder(u, guest("web-1"), guest("shop-1", refuses(D)), peer("host-b", 64*gib)))

	u = update("ovs", normal, change("openvswitch-switch", maint.ChangeService, B1, D))
	var holds []maint.Felt
	for i, work := range []time.Duration{2100, 1900, 2000, 2400, 2050, 1950, 2200} {
		holds = append(holds, maint.Felt{Rung: B1, UUID: "00000001-1111-1111-1111-111111111111", At: now.Add(-time.Duration(7-i) * 24 * time.Hour),
			Pause: (work + 12) * time.Millisecond, Work: work * time.Millisecond, Step: "restart openvswitch-switch.service"})
	}
	add("measured-hold", "The step has been run before: what it took counts for more than what the manifest says.", u, ladder(u, guest("web-1"), guest("web-2"), holds))

	u = update("qemu-10", normal, change("qemu", maint.ChangeQEMU, B2, D))
	add("measured-qemu", "What a guest has felt itself counts for more than what others have.", u,
		ladder(u, guest("web-1"), guest("web-2"),
			felt(B2, maint.VMMInPlace, 1, 510*time.Millisecond, 530*time.Millisecond, 500*time.Millisecond, 560*time.Millisecond),
			felt(B2, maint.VMMInPlace, 9, 900*time.Millisecond, 1100*time.Millisecond, 950*time.Millisecond, 1000*time.Millisecond, 980*time.Millisecond)))

	u = update("monthly", normal, change("fix", maint.ChangeLivepatch, A), change("qemu", maint.ChangeQEMU, B2, B3, D), change("storage", maint.ChangePackages, B1, D))
	u.Changes[2].Apply, u.Changes[2].Verify = command(4*time.Second, "systemctl", "restart", "ceph.target"), command(time.Second, "ceph", "health")
	u.Changes[2].Undo = command(0, "apt-get", "install", "-y", "ceph-common=17")
	u.Checks = []maint.UpdateCheck{
		{Name: "disks", When: []maint.CheckWhen{maint.CheckBefore}, Command: []string{"/usr/sbin/smartctl", "-H", "/dev/sda"}},
		{Name: "guests", When: []maint.CheckWhen{maint.CheckBefore, maint.CheckBetween, maint.CheckAfter}, Guests: true},
	}
	add("mixed", "One update, three ways: some guests are held, one moves, and a third's owner has a window.", u,
		ladder(u, guest("web-1"), guest("voip-1", maxPause(3*time.Second)), guest("shop-1", nightly(22)), peer("host-b", 64*gib)), back)
	return all
}

// Each situation and its plan are in testdata: they are documentation, too. To write them
// anew: go test ./agent/plan -update.
func TestGolden(t *testing.T) {
	t.Parallel()
	for _, s := range situations() {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			p := plan.Make(s.update, s.ladder, s.options)
			p.Hash = "" // it says nothing to a reader, and changes with every field
			got := []byte(s.describe() + "\n" + p.Text())
			file := filepath.Join("testdata", s.name+".txt")
			if *write {
				if err := os.WriteFile(file, got, 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), string(got)); diff != "" {
				t.Errorf("%s is not as it was (-was +is):\n%s", file, diff)
			}
		})
	}
}

// TestGoldenAreAllThere: a file whose situation has gone would be read as true.
func TestGoldenAreAllThere(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil {
		t.Fatal(err)
	}
	if all := situations(); len(files) != len(all) || len(all) < 30 {
		t.Errorf("%d files, %d situations", len(files), len(all))
	}
}

// TestSealed: a plan can be written and read, and not changed in between.
func TestSealed(t *testing.T) {
	t.Parallel()
	for _, s := range situations() {
		p := plan.Make(s.update, s.ladder, s.options)
		text := p.Encode()
		read, err := maint.DecodePlan("p.json", text)
		if err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
		if !bytes.Equal(read.Encode(), text) {
			t.Errorf("%s: is otherwise when it has been read", s.name)
		}
		if lines := maint.PlanDiff(p, read); len(lines) > 0 {
			t.Errorf("%s: differs from itself: %q", s.name, lines)
		}
	}
}

// TestTableFits: a plan's table of guests is no wider than a terminal that is wide, nor is what is
// said beneath it, of however many guests.
func TestTableFits(t *testing.T) {
	t.Parallel()
	u, l := crowd()
	plans := map[string]maint.Plan{"a crowd": plan.Make(u, l, maint.PlanOptions{})}
	for _, s := range situations() {
		plans[s.name] = plan.Make(s.update, s.ladder, s.options)
	}
	rows := 0
	for name, p := range plans {
		_, table, _ := strings.Cut(p.Text(), "\nGUEST ")
		table, _, _ = strings.Cut(table, "\n\n")
		for line := range strings.Lines(table) {
			rows++
			if reason := strings.Contains(line, " not by ") || strings.Contains(line, "→"); len(line) > 101 && !reason {
				t.Errorf("%s: %s", name, line)
			}
		}
	}
	if rows < 600 {
		t.Errorf("only %d rows", rows)
	}
}
