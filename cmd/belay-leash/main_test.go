package main

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestFlags(t *testing.T) {
	public := filepath.Join(t.TempDir(), "public")
	must(t, os.Mkdir(public, 0o755))
	for _, c := range []struct {
		args           []string
		code           int
		stdout, stderr string // are in it; "" for nothing at all
	}{
		{[]string{"-version"}, 0, "belay-leash devel\n", ""},
		{[]string{"-help"}, 0, "", "-libvirt-socket socket"},
		{[]string{"-frobnicate"}, 2, "", "flag provided but not defined"},
		{nil, 2, "", "is started by belayd"},
		{[]string{"-op", "hold-1", "more"}, 2, "", "is started by belayd"},
		{[]string{"-op", "hold-1", "-dir", "leash"}, 2, "", "absolute -dir"},
		{[]string{"-op", "../hold", "-dir", t.TempDir()}, 1, "", "is no name of an operation"},
		{[]string{"-op", "hold-1", "-dir", public}, 1, "", "can be entered by others"},
	} {
		var stdout, stderr bytes.Buffer
		code := run(t.Context(), c.args, nil, &stdout, &stderr)
		is := func(got, want string) bool {
			return want == "" && got == "" || want != "" && strings.Contains(got, want)
		}
		if code != c.code || !is(stdout.String(), c.stdout) || !is(stderr.String(), c.stderr) {
			t.Errorf("%q: exit code %d, %q, %q; want %+v", c.args, code, &stdout, &stderr, c)
		}
	}
}

// A log that nobody takes off holds nobody up.
func TestLogDoesNotWait(t *testing.T) {
	r, w, err := os.Pipe()
	must(t, err)
	defer r.Close()
	log, flush := newLog(w)
	begun := time.Now()
	for range 20 * logRoom { // more than the pipe has room for
		log.Error("guest is still paused", "err", strings.Repeat("x", 100))
	}
	flush()
	if took := time.Since(begun); took > 2*logFlush+2*time.Second {
		t.Errorf("it took %s", took)
	}
}

// journald is told what is an alarm, and the time is its own.
func TestJournal(t *testing.T) {
	t.Setenv("JOURNAL_STREAM", "8:1234")
	var b bytes.Buffer
	log, flush := newLog(&b)
	log.Info("armed", "text", "level=ERROR")
	log.Warn("guest released")
	log.Error("guest is still paused")
	flush()
	if want := "<6>level=INFO msg=armed text=\"level=ERROR\"\n<4>level=WARN msg=\"guest released\"\n<2>level=ERROR msg=\"guest is still paused\"\n"; b.String() != want {
		t.Errorf("%s\nwant\n%s", &b, want)
	}
}

// Only alarms are for syslog.
func TestAlarmsOnly(t *testing.T) {
	var b bytes.Buffer
	log := slog.New(slog.NewTextHandler(alarmsOnly{&b}, nil))
	log.Info("armed")
	log.Warn("guest released")
	log.Error("guest is still paused")
	if n := strings.Count(b.String(), "\n"); n != 1 || !strings.Contains(b.String(), "still paused") {
		t.Errorf("%s", &b)
	}
}

// BenchmarkArm is the time from a leash's start to its answer, and what memory
// it takes then.
func BenchmarkArm(b *testing.B) {
	s := newSite(b)
	var took []time.Duration
	var memory int
	for b.Loop() {
		o := s.order(time.Minute)
		begun := time.Now()
		line, err := s.client.Arm(b.Context(), o)
		must(b, err)
		took = append(took, time.Since(begun))
		memory = max(memory, rss(b, s.leash(o.Op)))
		_, err = line.Disarm(b.Context())
		must(b, err)
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "ms/median")
	b.ReportMetric(float64(took[len(took)-1].Microseconds())/1000, "ms/max")
	b.ReportMetric(float64(memory), "KiB")
}

// rss is the resident memory of a process, KiB.
func rss(t testing.TB, pid int) (kib int) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(t, err)
	_, after, _ := strings.Cut(string(status), "VmRSS:")
	_, err = fmt.Sscan(after, &kib)
	must(t, err)
	return kib
}
