package lab_test

import (
	"crypto/rand"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"belay/vmtests/lab"
)

func itoa(n int) string                        { return strconv.Itoa(n) }
func ms(n int) time.Duration                   { return time.Duration(n) * time.Millisecond }
func randomName() string                       { return "t" + strings.ToLower(rand.Text()[:8]) }
func wantNothingLeft(t *testing.T, l *lab.Lab) { t.Helper(); wantNamedNothing(t, l.Name) }

// wantNamedNothing looks for what a lab of that name may have left anywhere on
// the machine. It looks by name, since other labs come and go meanwhile.
func wantNamedNothing(t *testing.T, name string) {
	t.Helper()
	out, err := exec.Command("ip", "netns", "list").Output()
	if err != nil {
		t.Fatal(err)
	}
	wantNot(t, "ip netns list", out, "belay-"+name)
	files, err := filepath.Glob("/var/lib/belay-lab/" + name + "*")
	if err != nil || len(files) > 0 {
		t.Errorf("left behind: %v, %v", files, err)
	}
	// The mounts of every process: of the machine's and of those that may
	// still be in a host.
	for _, pattern := range []string{"/proc/[0-9]*/mountinfo", "/proc/[0-9]*/cmdline", "/proc/[0-9]*/environ"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			if strings.HasPrefix(file, "/proc/"+itoa(os.Getpid())+"/") && !strings.HasSuffix(file, "mountinfo") {
				continue
			}
			if text, err := os.ReadFile(file); err == nil { // else it has ended
				wantNot(t, file, text, "belay-lab/"+name)
				wantNot(t, file, text, "belay-"+name+"-")
			}
		}
	}
}

func wantNot(t *testing.T, where string, text []byte, what string) {
	t.Helper()
	if strings.Contains(string(text), what) {
		t.Errorf("%s still has %s:\n%s", where, what, text)
	}
}

// machineLinks names the links in the machine's own network.
func machineLinks(t *testing.T) []string {
	t.Helper()
	links, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, l := range links {
		names = append(names, l.Name)
	}
	return names
}
