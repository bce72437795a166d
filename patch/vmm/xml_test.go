package vmm_test

import (
	"encoding/xml"
	"strings"
	"testing"

	"belay/patch/vmm"
)

const plainXML = `<domain type='kvm' id='7'>
  <name>a &amp; b</name>
  <metadata><x:y xmlns:x="urn:x"><commandline/></x:y></metadata>
  <devices/>
</domain>
`

func TestIncoming(t *testing.T) {
	t.Parallel()
	once, err := vmm.Incoming(plainXML, "rep-1")
	if err != nil {
		t.Fatal(err)
	}
	want := `<domain type='kvm' id='7' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>a &amp; b</name>
  <metadata><x:y xmlns:x="urn:x"><commandline/></x:y></metadata>
  <devices/>
  <qemu:commandline>
    <qemu:arg value='-incoming'/>
    <qemu:arg value='defer'/>
    <qemu:env name='BELAY_REPLACE' value='rep-1'/>
  </qemu:commandline>
</domain>`
	if once != want {
		t.Errorf("got\n%s\nwant\n%s", once, want)
	}
	// Again: nothing is there twice.
	twice, err := vmm.Incoming(once, "rep-2")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Join(strings.Fields(twice), " ") != strings.Join(strings.Fields(strings.ReplaceAll(want, "rep-1", "rep-2")), " ") {
		t.Errorf("got\n%s", twice)
	}
}

// What somebody else gives QEMU stays.
func TestIncomingKeepsOthers(t *testing.T) {
	t.Parallel()
	text := `<domain type='kvm' xmlns:qemu="http://libvirt.org/schemas/domain/qemu/1.0"><name>x</name>` +
		`<qemu:commandline><qemu:arg value='-global'/><qemu:arg value='a=&lt;b&gt;'/><qemu:env name='E' value='1'/></qemu:commandline>` +
		`<qemu:capabilities><qemu:add capability='c'/></qemu:capabilities></domain>`
	for range 2 {
		var err error
		if text, err = vmm.Incoming(text, "rep-1"); err != nil {
			t.Fatal(err)
		}
		var d struct {
			Lines []struct {
				Args []struct {
					Value string `xml:"value,attr"`
				} `xml:"arg"`
				Env []struct {
					Name string `xml:"name,attr"`
				} `xml:"env"`
			} `xml:"http://libvirt.org/schemas/domain/qemu/1.0 commandline"`
			Caps []struct{} `xml:"http://libvirt.org/schemas/domain/qemu/1.0 capabilities"`
		}
		if err := xml.Unmarshal([]byte(text), &d); err != nil {
			t.Fatal(err)
		}
		if len(d.Lines) != 1 || len(d.Caps) != 1 || len(d.Lines[0].Args) != 4 || d.Lines[0].Args[1].Value != "a=<b>" || len(d.Lines[0].Env) != 2 {
			t.Fatalf("%+v in\n%s", d, text)
		}
	}
}

// The new QEMU has the devices of the old one; what else changes in a guest's XML is no matter.
func TestSameDevices(t *testing.T) {
	t.Parallel()
	const text = "<domain id='1'><vcpu current='1'>2</vcpu><currentMemory>1</currentMemory><devices>" +
		"<disk type='file'><source file='/a b'/><target dev='vda'/></disk><channel><target name='agent' state='connected'/></channel></devices></domain>"
	started, err := vmm.Incoming(text, "rep-1")
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		from, to string
		same     bool
	}{
		"as it was":     {"", "", true},
		"channel":       {"state='connected'", "state='disconnected'", true},
		"balloon":       {"<currentMemory>1<", "<currentMemory>2<", true},
		"spelling":      {"<disk type='file'>", "\n  <disk  type=\"file\">\n", true},
		"medium":        {"/a b", "/a", false},
		"unplugged":     {"<channel><target name='agent' state='connected'/></channel>", "", false},
		"plugged":       {"<channel>", "<disk type='file'/><channel>", false},
		"other address": {"dev='vda'", "dev='vdb'", false},
		"vCPU":          {"current='1'", "current='2'", false},
	} {
		if same, err := vmm.SameDevices(started, strings.Replace(text, c.from, c.to, 1)); err != nil || same != c.same {
			t.Errorf("%s: %v, %v", name, same, err)
		}
	}
	if _, err := vmm.SameDevices(started, "<domain"); err == nil {
		t.Error("what cannot be read is taken for something")
	}
}

func TestIncomingBroken(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"", "<domain", "<domain><a></domain>", "no xml", "<domain/>", "<network></network>"} {
		if got, err := vmm.Incoming(text, "rep-1"); err == nil {
			t.Errorf("%q gave %q", text, got)
		}
	}
}

func FuzzIncoming(f *testing.F) {
	f.Add(plainXML)
	f.Fuzz(func(t *testing.T, text string) {
		got, err := vmm.Incoming(text, "rep-1")
		if err != nil {
			return
		}
		again, err := vmm.Incoming(got, "rep-1")
		if err != nil || strings.Count(again, "BELAY_REPLACE") != strings.Count(got, "BELAY_REPLACE") {
			t.Errorf("%q gave %q, and that %q, %v", text, got, again, err)
		}
	})
}
