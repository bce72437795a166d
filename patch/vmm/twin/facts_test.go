package twin

import (
	"encoding/xml"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
)

func TestClassify(t *testing.T) {
	t.Parallel()
	g := func(state maint.GuestState, reason, job string) *maint.View {
		return &maint.View{Guest: &maint.Guest{State: state, Reason: reason, Job: job}}
	}
	absent, defined := &maint.View{}, g(maint.GuestShutoff, "migrated", "")
	running := g(maint.GuestRunning, "booted", "")
	resumed := g(maint.GuestRunning, reasonResumed, "")
	sends := g(maint.GuestRunning, "booted", jobOut)
	incoming := g(maint.GuestPaused, "migrating", jobIn)
	stopped := g(maint.GuestPaused, "migrating", "")
	paused := g(maint.GuestPaused, "user", "")
	for _, c := range []struct {
		from, to *maint.View
		want     situation
	}{
		{running, absent, here},
		{running, defined, here},
		{running, nil, here},
		{resumed, absent, here},
		{resumed, nil, unknown},
		{running, incoming, switching},
		{running, running, both},
		{sends, incoming, copying},
		{sends, nil, copying},
		{sends, running, copying},
		{stopped, incoming, switching},
		{stopped, running, leftover},
		{stopped, nil, switching},
		{stopped, absent, switching},
		{paused, absent, here},
		{paused, nil, here},
		{paused, running, leftover},
		{paused, paused, switching},
		{incoming, sends, there},
		{incoming, running, there},
		{incoming, nil, unknown},
		{incoming, absent, switching},
		{defined, incoming, switching},
		{defined, running, there},
		{defined, paused, there},
		{defined, absent, off},
		{absent, absent, off},
		{absent, nil, unknown},
		{nil, running, unknown},
	} {
		if got := classify(c.from, c.to); got != c.want {
			t.Errorf("from %+v, to %+v: %s, want %s", c.from, c.to, got, c.want)
		}
	}
}

const plainDevices = `<emulator>/usr/bin/qemu-system-x86_64</emulator>
<disk type='file' device='disk'><source file='/var/lib/libvirt/images/web.qcow2'/><target dev='vda'/></disk>
<disk type='block' device='disk'><source dev='/dev/sdb'/><target dev='vdb'/></disk>
<controller type='pci' model='pcie-root'/>
<interface type='bridge'><source bridge='br0'/></interface>
<interface type='network'><source network='default'/></interface>
<serial type='pty'/><console type='pty'/><channel type='unix'><target name='org.qemu.guest_agent.0'/></channel>
<channel type='spicevmc'/>
<graphics type='vnc' port='5900' autoport='yes'/>
<graphics type='spice'><listen type='none'/></graphics>
<video/><memballoon model='virtio'/><rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>`

func domainText(before, devices string) string {
	return "<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>web-1</name>" +
		"<os><nvram>/var/lib/libvirt/qemu/nvram/web_VARS.fd</nvram></os>" + before + "<devices>" + devices + "</devices></domain>"
}

func TestFit(t *testing.T) {
	t.Parallel()
	nets := map[string]string{"default": "<network/>"}
	ok := domainText(`<cputune><vcpupin vcpu='0' cpuset='1'/></cputune><seclabel type='dynamic' model='dac' relabel='yes'/><seclabel type='none' model='apparmor'/>
<qemu:commandline><qemu:arg value='-incoming'/><qemu:arg value='defer'/><qemu:env name='BELAY_TWIN' value='x'/></qemu:commandline>`, plainDevices)
	if problems, err := fit("web-1", ok, nets); err != nil || len(problems) != 0 {
		t.Errorf("a plain guest: %v, %v", problems, err)
	}
	for _, c := range []struct{ before, device, want string }{
		{"<memoryBacking><hugepages/></memoryBacking>", "", "huge pages"},
		{"<cputune><quota>1000</quota></cputune>", "", "<quota>"},
		{"<cputune><cachetune vcpus='0'/></cputune>", "", "<cachetune>"},
		{"<seclabel type='dynamic' model='apparmor' relabel='yes'/>", "", "apparmor"},
		{"<qemu:commandline><qemu:arg value='-gdb'/><qemu:arg value='tcp::1234'/></qemu:commandline>", "", "qemu:commandline"},
		{"<qemu:commandline><qemu:env name='X' value='y'/></qemu:commandline>", "", "qemu:commandline"},
		{"", "<interface type='network'><source network='pool'/></interface>", "network pool"},
		{"", "<interface type='bridge'><source bridge='br0'/><target dev='web'/></interface>", "called web"},
		{"", "<interface type='bridge'><filterref filter='clean-traffic'/></interface>", "network filter"},
		{"", "<interface type='bridge'><virtualport type='openvswitch'/></interface>", "virtual port"},
		{"", "<interface type='direct'><source dev='eth0'/></interface>", "type direct"},
		{"", "<interface type='vhostuser'/>", "type vhostuser"},
		{"", "<graphics type='vnc' port='5901'/>", "fixed port"},
		{"", "<graphics type='vnc' port='5901' autoport='yes' websocket='5701'/>", "web socket"},
		{"", "<graphics type='spice' tlsPort='5902'/>", "fixed port"},
		{"", "<graphics type='sdl'/>", "type sdl"},
		{"", "<serial type='tcp'><source mode='bind' host='0' service='2222'/></serial>", "type tcp"},
		{"", "<channel type='unix'><source mode='bind' path='/tmp/x.sock'/></channel>", "type unix"},
		{"", "<disk type='volume'><target dev='vda'/></disk>", "type volume"},
		{"", "<disk type='nvme'><target dev='vda'/></disk>", "type nvme"},
		{"", "<disk type='file'><source file='/var/lib/libvirt/qemu/save/x.img'/></disk>", "/var/lib/libvirt/qemu/save/x.img"},
		{"", "<disk type='file'><source file='/var/run/libvirt/x.img'/></disk>", "/run/libvirt/x.img"},
		{"", "<tpm model='tpm-crb'><backend type='emulator'/></tpm>", "TPM"},
		{"", "<vsock model='virtio'><cid auto='yes' address='3'/></vsock>", "CID"},
		{"", "<hostdev mode='subsystem' type='pci'/>", "<hostdev>"},
		{"", "<filesystem type='mount'/>", "<filesystem>"},
		{"", "<shmem name='x'/>", "<shmem>"},
		{"", "<memory model='nvdimm'/>", "<memory>"},
		{"", "<redirdev bus='usb' type='tcp'/>", "<redirdev>"},
		{"", "<input type='passthrough'/>", "input"},
		{"", "<rng><backend model='egd'/></rng>", "socket"},
		{"", "<gizmo/>", "<gizmo>"},
	} {
		problems, err := fit("web-1", domainText(c.before, plainDevices+c.device), nets)
		if err != nil || len(problems) == 0 || !slices.ContainsFunc(problems, func(p maint.Problem) bool { return strings.Contains(p.Reason, c.want) }) {
			t.Errorf("%s%s: %v, %v; want one with %q", c.before, c.device, problems, err, c.want)
		}
	}
	if _, err := fit("web-1", "<domain", nets); err == nil {
		t.Error("read what is no XML")
	}
}

func TestGuard(t *testing.T) {
	t.Parallel()
	file := "<disk type='file'><target dev='vda'/></disk>"
	block := "<disk type='block'><target dev='vdb'/></disk>"
	shared := "<disk type='file'><target dev='vdc'/><shareable/></disk>"
	rbd := "<disk type='network'><target dev='vdd'/></disk>"
	cd := "<disk type='block' device='cdrom'><target dev='sda'/><readonly/></disk>"
	for _, c := range []struct {
		disks, conf string
		hooked      bool
		bare        []string
		by          string
	}{
		{file + cd, "", false, nil, "image locks"},
		{file + block, "", false, []string{"vdb"}, ""},
		{file + block, "namespaces = [ ]\n", false, nil, "image locks"},
		{file + block, "# namespaces = []\n", false, []string{"vdb"}, ""},
		{block, "", true, nil, "hook"},
		{block, "#lock_manager = \"lockd\"\n", false, []string{"vdb"}, ""},
		{block, "lock_manager = \"lockd\"\n", false, nil, "lockd"},
		{shared, "namespaces = []\n", false, []string{"vdc"}, ""},
		{rbd, "namespaces = []\n", false, []string{"vdd"}, ""},
		{"", "", false, nil, "having no disk"},
	} {
		g, err := guard(domainText("", c.disks), settings{qemuConf: c.conf}, c.hooked)
		if err != nil || !slices.Equal(g.Bare, c.bare) || len(g.problems("web-1")) != min(len(c.bare), 1) || !strings.Contains(strings.Join(g.By, ", "), c.by) {
			t.Errorf("%s with %q, hook %t: %+v, %v; want %v, %q", c.disks, c.conf, c.hooked, g, err, c.bare, c.by)
		}
	}
}

// hostTree is a host's files for the twin to be made from.
func hostTree(t *testing.T, files map[string]string) string {
	t.Helper()
	host := t.TempDir()
	for name, text := range files {
		path := host + name
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return host
}

func TestMakeFiles(t *testing.T) {
	t.Parallel()
	host := hostTree(t, map[string]string{
		"/etc/machine-id":                            "0123\n",
		"/etc/libvirt/qemu.conf":                     "user = \"root\"\nmemory_backing_dir = \"/mem\"\n",
		"/etc/libvirt/libvirtd.conf":                 "listen_tcp = 1\n",
		"/etc/libvirt/virtlogd.conf":                 "max_clients = 7\n",
		"/etc/libvirt/hooks/qemu":                    "#!/bin/sh\nexit 1\n",
		"/etc/libvirt/qemu/web-1.xml":                "<domain/>",
		"/etc/libvirt/qemu/autostart/web-1.xml":      "<domain/>",
		"/etc/libvirt/secrets/1.base64":              "c2VjcmV0",
		"/etc/libvirt/qemu/networks/default.xml":     "<!-- by hand --><network><name>default</name><uuid>u1</uuid><forward mode='nat'/><bridge name='virbr0' stp='on'/><ip address='1.2.3.4'/></network>",
		"/etc/libvirt/qemu/networks/pool.xml":        "<network><name>pool</name><forward mode='hostdev'/></network>",
		"/etc/libvirt/qemu/networks/br.xml":          "<network><name>br</name><forward mode='bridge'/><bridge name='br0'/><portgroup name='a' default='yes'><bandwidth/></portgroup></network>",
		"/etc/libvirt/qemu/networks/mac.xml":         "<network><name>mac</name><forward mode='bridge'><interface dev='eth0'/></forward></network>",
		"/var/cache/libvirt/qemu/capabilities/1.xml": "<qemuCaps/>",
		"/var/lib/libvirt/qemu/x":                    "",
	})
	p := place(filepath.Join(t.TempDir(), "twin"))
	s := settings{hostname: "host-a", qemuConf: "user = \"root\"\nmemory_backing_dir = \"/mem\"\n"}
	for range 2 { // it may be there already
		if err := p.makeFiles(host, s); err != nil {
			t.Fatal(err)
		}
	}
	read := func(name string) string {
		text, err := os.ReadFile(p.at(name))
		if err != nil {
			t.Error(err)
		}
		return string(text)
	}
	if conf := read("etc/qemu.conf"); (settings{qemuConf: conf}).memory() != "/mem/belay-twin" || !strings.Contains(conf, "user = \"root\"") {
		t.Errorf("qemu.conf:\n%s", conf)
	}
	if conf := read("etc/libvirtd.conf"); strings.Contains(conf, "listen_tcp = 1") || !strings.Contains(conf, "host_uuid") {
		t.Errorf("libvirtd.conf:\n%s", conf)
	}
	if read("etc/virtlogd.conf") != "max_clients = 7\n" || read("etc/secrets/1.base64") != "c2VjcmV0" || read("cache/qemu/capabilities/1.xml") != "<qemuCaps/>" {
		t.Error("settings, secrets or cache are not the host's")
	}
	if hook := read("etc/hooks/qemu"); strings.Contains(hook, "exit 1\n}") == false || strings.Contains(hook, "hooked=") {
		t.Errorf("the twin's hook:\n%s", hook)
	}
	for _, not := range []string{"etc/qemu/web-1.xml", "etc/qemu/autostart", "etc/qemu/networks/pool.xml", "etc/qemu/networks/mac.xml"} {
		if _, err := os.Lstat(p.at(not)); err == nil {
			t.Errorf("%s is in the twin", not)
		}
	}
	for name, bridge := range map[string]string{"default": "virbr0", "br": "br0"} {
		var n networkXML
		if err := xml.Unmarshal([]byte(read("etc/qemu/networks/"+name+".xml")), &n); err != nil {
			t.Fatal(err)
		}
		if n.Name != name || n.Forward == nil || n.Forward.Mode != "bridge" || n.Bridge.Name != bridge || strings.Contains(read("etc/qemu/networks/"+name+".xml"), "<ip") {
			t.Errorf("network %s: %s", name, read("etc/qemu/networks/"+name+".xml"))
		}
		if to, err := os.Readlink(p.at("etc/qemu/networks/autostart", name+".xml")); err != nil || to != "/etc/libvirt/qemu/networks/"+name+".xml" {
			t.Errorf("autostart of %s: %s, %v", name, to, err)
		}
	}
	if text := read("etc/qemu/networks/br.xml"); !strings.Contains(text, `<portgroup name="a" default="yes"><bandwidth/></portgroup>`) {
		t.Errorf("port groups: %s", text)
	}
}

func TestSettings(t *testing.T) {
	t.Parallel()
	s := settings{qemuConf: "#memory_backing_dir = \"/a\"\n  memory_backing_dir = \"/b\"\nmemory_backing_dir = \"/c\"\n"}
	if s.memory() != "/b" || s.homeRAMs() != "/b/libvirt/qemu" || s.twinMemory() != "/b/belay-twin" {
		t.Errorf("%s %s %s", s.memory(), s.homeRAMs(), s.twinMemory())
	}
	s = settings{}
	if s.memory() != ramDir || s.homeRAMs() != ramDir {
		t.Errorf("by default %s, %s", s.memory(), s.homeRAMs())
	}
	if a, b := hostUUID("/nowhere", "a"), hostUUID("/nowhere", "b"); a == b || a != hostUUID("/nowhere", "a") || len(a) != 36 {
		t.Errorf("host UUIDs %s, %s", a, b)
	}
	for _, name := range []string{"a", "a.example.com", strings.Repeat("x", 64)} {
		if n := twinName(name); len(n) > 64 || !strings.Contains(n, ".") || n == name {
			t.Errorf("%s: %s", name, n)
		}
	}
}

func TestIncomingXML(t *testing.T) {
	t.Parallel()
	text := "<domain type='kvm'>\n  <memoryBacking><source type='file'/><allocation mode='immediate' threads='2'/></memoryBacking>\n</domain>\n"
	for range 2 { // a second time it replaces what the first has left
		var err error
		if text, err = incomingXML(text, "tok"); err != nil {
			t.Fatal(err)
		}
		var d domainXML
		if err := xml.Unmarshal([]byte(text), &d); err != nil || len(d.Options.Args) != 2 || len(d.Options.Env) != 1 || !ownOptions(&d) {
			t.Errorf("%v: %s", err, text)
		}
		if strings.Contains(text, "allocation") || strings.Count(text, "xmlns:qemu") != 1 {
			t.Error(text)
		}
	}
	if _, err := incomingXML("nothing", "tok"); err == nil {
		t.Error("took what is no domain")
	}
}

func TestLend(t *testing.T) {
	t.Parallel()
	tw := &Twin{Root: filepath.Join(t.TempDir(), "twin")}
	for _, side := range []string{atHome, inTwin} {
		if err := os.MkdirAll(tw.place().at("link", side), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Lend("u", true, "tok", []string{"/a", "/b c"}); err != nil {
		t.Fatal(err)
	}
	set, err := readSettings("")
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(tw.place().order(atHome, "u"))
	if want := "tok\n" + set.homeRAMs() + "\n/a\n/b c\n"; err != nil || string(text) != want {
		t.Errorf("order %q, %v; want %q", text, err, want)
	}
	if err := tw.Lend("u", true, "tok", []string{"/a\nb"}); err == nil {
		t.Error("took a name with a line break")
	}
	for range 2 {
		if err := tw.Lend("u", true, "", nil); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(tw.place().order(atHome, "u")); err == nil {
		t.Error("the order is still there")
	}
}

func TestSink(t *testing.T) {
	t.Parallel()
	tw := &Twin{Root: t.TempDir()}
	if err := os.Mkdir(tw.place().at("sink"), 0o700); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		path, stop, err := tw.Sink("u")
		if err != nil {
			t.Fatal(err)
		}
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(make([]byte, 1<<20)); err != nil {
			t.Error(err)
		}
		stop()
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("after its end: %v", err)
		}
		c.Close()
	}
}

func TestRoom(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "meminfo")
	if err := os.WriteFile(file, []byte("MemTotal: 100 kB\nMemFree: 1 kB\nMemAvailable:     50 kB\nCached: 90 kB\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if n, err := availableMemory(file); err != nil || n != 50<<10 {
		t.Errorf("available: %d, %v", n, err)
	}
	if _, err := availableMemory(os.DevNull); err == nil {
		t.Error("found memory in nothing")
	}
	if n, err := freeSpace(t.TempDir() + "/not/there/yet"); err != nil || n == 0 {
		t.Errorf("free space: %d, %v", n, err)
	}
	for _, c := range []struct {
		need  uint64
		files bool
		want  int
	}{{1 << 20, true, 0}, {1 << 60, false, 1}, {1 << 60, true, 2}} {
		problems, err := room("web-1", c.need, c.files, t.TempDir())
		if err != nil || len(problems) != c.want {
			t.Errorf("%+v: %v, %v", c, problems, err)
		}
	}
}

// A pid file names a process for as long as that holds its lock.
func TestHolder(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "x.pid")
	if pid, err := holder(file); pid != 0 || err != nil {
		t.Errorf("no file: %d, %v", pid, err)
	}
	if err := os.WriteFile(file, []byte("1"), 0o600); err != nil {
		t.Fatal(err)
	}
	if pid, err := holder(file); pid != 0 || err != nil {
		t.Errorf("a stale file: %d, %v", pid, err)
	}
	cmd := exec.Command("perl", "-e", `use Fcntl; open my $f, '+<', $ARGV[0] or die; my $l = pack('s s x4 q q i x4', F_WRLCK, 0, 0, 0, 0); fcntl($f, F_SETLK, $l) or die; $| = 1; print "locked\n"; sleep 60`, file)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 7)); err != nil {
		t.Fatal(err)
	}
	if pid, err := holder(file); pid != cmd.Process.Pid || err != nil {
		t.Errorf("held by %d, %v; want %d", pid, err, cmd.Process.Pid)
	}
	p, err := openProcess(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	if p.ended(10 * time.Millisecond) {
		t.Error("a living process has ended")
	}
	if err := p.signal(unix.SIGTERM); err != nil || !p.ended(10*time.Second) {
		t.Errorf("it does not end: %v", err)
	}
	_ = cmd.Wait()
	if alive, err := living([]string{file}); len(alive) != 0 || err != nil {
		t.Errorf("alive: %v, %v", alive, err)
	}
	if err := p.signal(unix.SIGTERM); err != nil {
		t.Errorf("a signal to a process that has ended: %v", err)
	}
}

func TestRemoveEmpty(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := errors.Join(os.MkdirAll(dir+"/a/b/c", 0o700), os.MkdirAll(dir+"/a/d", 0o700), os.WriteFile(dir+"/a/d/ram", nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := removeEmpty(dir + "/a"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir + "/a/b"); err == nil {
		t.Error("an empty folder is left")
	}
	if _, err := os.Stat(dir + "/a/d/ram"); err != nil {
		t.Errorf("a file has gone: %v", err)
	}
}
