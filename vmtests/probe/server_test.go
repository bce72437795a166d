package probe

import (
	"bufio"
	"bytes"
	"encoding/json"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// testServer serves one end of a pipe; ask sends raw lines and returns the
// replies to n requests by id.
func testServer(t *testing.T) (ask func(n int, lines string) map[string]Reply, s *Server) {
	t.Helper()
	root := t.TempDir()
	disk := filepath.Join(root, "disk")
	if err := os.WriteFile(disk, make([]byte, 4*mib), 0o600); err != nil {
		t.Fatal(err)
	}
	s = &Server{
		Log: slog.New(slog.DiscardHandler), Guest: "g", Incarnation: 5, Memory: newMemory(t), Disk: NewDisk(disk),
		Sender: &Sender{every: DefaultInterval}, Clock: &Clock{}, KmsgPath: "/dev/null", ProcRoot: "/proc", SysRoot: "/sys",
	}
	far, near := net.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(far); far.Close() }()
	t.Cleanup(func() {
		near.Close()
		if err := <-ended; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	r := bufio.NewReader(near)
	return func(n int, lines string) map[string]Reply {
		go near.Write([]byte(lines))
		got := map[string]Reply{}
		for len(got) < n {
			line, err := r.ReadBytes('\n')
			if err != nil {
				t.Fatal(err)
			}
			if len(bytes.TrimSpace(line)) == 0 {
				continue
			}
			var reply Reply
			if err := json.Unmarshal(line, &reply); err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			got[reply.ID] = reply
		}
		return got
	}, s
}

func TestServerAnswers(t *testing.T) {
	ask, _ := testServer(t)
	got := ask(6, `{"id":"6","cmd":"clock"}
{"id":"1","cmd":"status"}
{"id":"2","cmd":"verify"}
{"id":"3","cmd":"dirty","args":{"working_set_mib":1}}
{"id":"4","cmd":"no such thing"}
{"id":"5","cmd":"corrupt","args":[]}
`)
	var st Status
	if err := json.Unmarshal(got["1"].Result, &st); err != nil || st.Guest != "g" || st.BootID == "" || st.Monotonic == 0 || st.Wall == 0 || !st.Disk {
		t.Errorf("status: %+v, %v", st, err)
	}
	if got["2"].Error != "" || got["3"].Error != "" {
		t.Errorf("%+v", got)
	}
	var c ClockReading
	if err := json.Unmarshal(got["6"].Result, &c); err != nil || time.Since(time.Unix(0, c.Wall)).Abs() > time.Minute || c.Monotonic <= 0 || len(c.Steps) != 0 {
		t.Errorf("clock: %+v, %v", c, err)
	}
	if !strings.Contains(got["4"].Error, "no such thing") || got["5"].Error == "" {
		t.Errorf("errors: %+v", got)
	}
}

// A client that was cut off leaves half a line; the next one begins with a
// line break.
func TestServerSurvivesGarbage(t *testing.T) {
	ask, _ := testServer(t)
	got := ask(2, `{"id":"1","cmd":"sta`+"\n"+`{"id":"2","cmd":"kmsg"}`+"\n\x00\xff\n"+
		strings.Repeat("x", 3*maxLine)+"\n"+`{"id":"3","cmd":"kmsg"}`+"\n")
	if got["2"].Error != "" || got["3"].Error != "" {
		t.Errorf("%+v", got)
	}
}

func TestDiskPattern(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 2*mib), 0o600); err != nil {
		t.Fatal(err)
	}
	d := NewDisk(path)
	c := DiskSettings{SizeMiB: 2, Seed: 3}
	wrote, err := d.Write(c)
	if err != nil {
		t.Fatal(err)
	}
	read, err := d.Verify(c)
	if err != nil || read.BadBlocks != 0 || read.Checksum != wrote.Checksum || read.Bytes != 2*mib {
		t.Errorf("wrote %+v, read %+v, %v", wrote, read, err)
	}
	if other, err := d.Verify(DiskSettings{SizeMiB: 2, Seed: 4}); err != nil || other.BadBlocks != 2*mib/pageSize {
		t.Errorf("another seed: %+v, %v", other, err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{0xaa}, 9000); err != nil {
		t.Fatal(err)
	}
	if bad, err := d.Verify(c); err != nil || bad.BadBlocks != 1 || bad.Checksum == wrote.Checksum {
		t.Errorf("one byte flipped: %+v, %v", bad, err)
	}
	for _, c := range []DiskSettings{{SizeMiB: 0}, {SizeMiB: -1}, {SizeMiB: 3}} {
		if _, err := d.Verify(c); err == nil {
			t.Errorf("%+v was read", c)
		}
	}
}

func TestKmsgCounts(t *testing.T) {
	var r KmsgReport
	for _, l := range []string{
		"watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [probe:70]",
		"rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
		"rcu: rcu_preempt kthread starved for 5252 jiffies!",
		"INFO: task jbd2:90 blocked for more than 120 seconds.",
		"BUG: kernel NULL pointer dereference, address: 0",
		"virtio_net virtio2 ens3: renamed from eth0",
	} {
		r.count(l)
	}
	if r.SoftLockups != 1 || r.RCUStalls != 2 || r.HungTasks != 1 || r.Bugs != 1 || len(r.Lines) != 5 || r.Clean() {
		t.Errorf("%+v", r)
	}
	if (KmsgReport{}).Clean() != true {
		t.Error("no complaints are not clean")
	}
}

func TestParseCmdline(t *testing.T) {
	c, err := ParseCmdline("console=ttyS0 belay.hostname=web-1 belay.heartbeat=10.77.255.254:9099 belay.interval_us=500 quiet")
	if err != nil || c.Guest != "web-1" || c.Heartbeat.String() != "10.77.255.254:9099" || c.Interval != 500 {
		t.Errorf("%+v, %v", c, err)
	}
	for _, bad := range []string{"belay.heartbeat=nowhere", "belay.interval_us=x"} {
		if _, err := ParseCmdline(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}
