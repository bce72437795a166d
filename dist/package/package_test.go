// Package package_test builds Belay's packages and looks at what they have, and at what
// dpkg does with them, as far as that goes without a system that runs.
package package_test

import (
	"bufio"
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience is far more than a build takes that finds nothing in Go's cache.
const patience = 10 * time.Minute

// output runs a program to its end.
func output(t *testing.T, env []string, name string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c := exec.CommandContext(ctx, name, args...)
	c.Env = append(os.Environ(), env...)
	out, err := c.CombinedOutput()
	return string(out), err
}

// must is output of what has to work.
func must(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := output(t, nil, name, args...)
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return out
}

// needs skips a test where a program is not installed.
func needs(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("%s is not installed", p)
		}
	}
}

// The versions that the tests make.
const older, newer = "1.2.2", "1.2.3~rc1"

// built are the packages of a version, made once for all tests.
func built(t *testing.T, version string) string {
	t.Helper()
	once.Lock()
	defer once.Unlock()
	dir := filepath.Join(folder, version)
	if _, err := os.Stat(dir); err == nil {
		return dir
	}
	build(t, version, dir)
	return dir
}

func build(t *testing.T, version, dir string) {
	t.Helper()
	out, err := output(t, []string{"BELAY_VERSION=" + version, "SOURCE_DATE_EPOCH=1790000000"}, "./build", dir)
	if err != nil {
		os.RemoveAll(dir)
		t.Fatalf("%v:\n%s", err, out)
	}
}

var (
	once   sync.Mutex
	folder string
)

func TestMain(m *testing.M) {
	var err error
	if folder, err = os.MkdirTemp("", "belay-packages"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(folder)
	os.Exit(code)
}

// one is the file of a package.
func one(t *testing.T, version, pattern string) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(built(t, version), pattern))
	if err != nil || len(found) != 1 {
		t.Fatalf("%s: %v, %v", pattern, found, err)
	}
	return found[0]
}

// unpacked is a root folder with what a Debian package has.
func unpacked(t *testing.T, pattern string) string {
	t.Helper()
	needs(t, "dpkg-deb")
	root := t.TempDir()
	must(t, "dpkg-deb", "-x", one(t, newer, pattern), root)
	return root
}

// content is what belongs to a host, beside man pages and documents: mode and name.
var content = []string{
	"-rwxr-xr-x /etc/libvirt/hooks/qemu.d/belay",
	"-rwxr-xr-x /etc/libvirt/hooks/qemu.d/belay-twin",
	"-rw-r--r-- /etc/belay/belayd.toml",
	"drwx------ /etc/belay/pki",
	"drwxr-xr-x /etc/belay/belayd.d",
	"drwxr-xr-x /etc/belay/keys",
	"-rwxr-xr-x /usr/bin/belay",
	"-rwxr-xr-x /usr/sbin/belayd",
	"-rwxr-xr-x /usr/sbin/belay-leash",
	"-rwxr-xr-x /usr/sbin/belay-kernel",
	"-rw-r--r-- /usr/lib/systemd/system/belay-kernel.socket",
	"-rw-r--r-- /usr/lib/systemd/system/belay-kernel@.service",
	"-rw-r--r-- /usr/lib/systemd/system/belayd.service",
	"-rw-r--r-- /usr/lib/systemd/logind.conf.d/belay.conf",
	"-rw-r--r-- /usr/lib/systemd/system/belay-restore.service",
	"-rw-r--r-- /usr/lib/sysusers.d/belay.conf",
	"-rw-r--r-- /usr/lib/tmpfiles.d/belay.conf",
	"-rw-r--r-- /usr/share/bash-completion/completions/belay",
	"-rw-r--r-- /usr/share/fish/vendor_completions.d/belay.fish",
	"-rw-r--r-- /usr/share/man/man8/belay.8.gz",
	"-rw-r--r-- /usr/share/man/man8/belay-hold.8.gz",
	"-rw-r--r-- /usr/share/man/man8/belayd.8.gz",
	"-rw-r--r-- /usr/share/man/man8/belay-leash.8.gz",
	"-rw-r--r-- /usr/share/man/man8/belay-kernel.8.gz",
	"-rw-r--r-- /usr/share/doc/belay/copyright",
	"-rw-r--r-- /usr/share/doc/belay/LICENSE",
	"-rw-r--r-- /usr/share/doc/belay/THIRD-PARTY.gz",
	"-rw-r--r-- /usr/share/doc/belay/README.md",
	"-rw-r--r-- /usr/share/doc/belay/ARCHITECTURE.md",
	"-rw-r--r-- /usr/share/doc/belay/docs/operator-guide.md",
	"-rw-r--r-- /usr/share/doc/belay/prometheus/belay-rules.yml",
	"-rw-r--r-- /usr/share/doc/belay/prometheus/belay-rules.test.yml",
	"-rw-r--r-- /usr/share/doc/belay/grafana/belay.json",
}

var contentDeb = append([]string{
	"-rw-r--r-- /etc/needrestart/conf.d/belay.conf",
	"-rw-r--r-- /usr/share/zsh/vendor-completions/_belay",
}, content...)

var contentRPM = append([]string{"-rw-r--r-- /usr/share/zsh/site-functions/_belay"}, content...)

var contentGuest = []string{
	"-rwxr-xr-x /usr/sbin/belay-guest",
	"-rw-r--r-- /usr/lib/systemd/system/belay-guest.service",
	"-rw-r--r-- /usr/share/doc/belay-guest/copyright",
	"-rw-r--r-- /usr/share/doc/belay-guest/LICENSE",
	"-rw-r--r-- /usr/share/doc/belay-guest/THIRD-PARTY.gz",
}

// sameContent compares, but for man pages and documents, of which there may be more, and
// for folders that are there anyway.
func sameContent(t *testing.T, got, want []string) {
	t.Helper()
	for _, w := range want {
		if !slices.Contains(got, w) {
			t.Errorf("it does not have %s", w)
		}
	}
	more := regexp.MustCompile(`^-rw-r--r-- /usr/share/(man/man8/belay-[a-z-]+\.8\.gz|doc/belay/docs/([a-z-]+\.md|examples/[a-z-]+\.toml))$`)
	for _, g := range got {
		if !slices.Contains(want, g) && !more.MatchString(g) && !strings.HasPrefix(g, "drwxr-xr-x /") {
			t.Errorf("it also has %s", g)
		}
	}
}

// pages checks that every man page and document of the repository is there.
func pages(t *testing.T, got []string) {
	t.Helper()
	docs, err := filepath.Glob("../../docs/*.md")
	examples, err2 := filepath.Glob("../../docs/examples/*.toml")
	if err := errors.Join(err, err2); err != nil || len(docs) == 0 || len(examples) == 0 {
		t.Fatal(docs, examples, err)
	}
	for _, d := range slices.Concat(docs, examples) {
		if want := "-rw-r--r-- /usr/share/doc/belay/" + strings.TrimPrefix(d, "../../"); !slices.Contains(got, want) {
			t.Errorf("it does not have %s", want)
		}
	}
}

func TestDeb(t *testing.T) {
	t.Parallel()
	needs(t, "dpkg-deb")
	list := func(pattern string) (files []string) {
		for line := range strings.Lines(must(t, "dpkg-deb", "-c", one(t, newer, pattern))) {
			f := strings.Fields(line)
			if f[1] != "root/root" {
				t.Errorf("not root's: %s", line)
			}
			files = append(files, f[0]+" "+strings.TrimSuffix(strings.TrimPrefix(f[5], "."), "/"))
		}
		return files
	}
	host := list("belay_*.deb")
	sameContent(t, host, contentDeb)
	pages(t, host)
	sameContent(t, list("belay-guest_*.deb"), contentGuest)

	conffiles := must(t, "dpkg-deb", "-I", one(t, newer, "belay_*.deb"), "conffiles")
	for _, c := range contentDeb {
		name := strings.Fields(c)[1]
		if is := strings.Contains(conffiles, name+"\n"); is != (c[0] == '-' && strings.HasPrefix(name, "/etc/")) {
			t.Errorf("%s is a configuration file: %v", name, is)
		}
	}
	for field, want := range map[string]string{"Package": "belay", "Version": "1.2.3~rc1-1", "Section": "admin"} {
		if got := strings.TrimSpace(must(t, "dpkg-deb", "-f", one(t, newer, "belay_*.deb"), field)); got != want {
			t.Errorf("%s is %q, want %q", field, got, want)
		}
	}
}

func TestRPM(t *testing.T) {
	t.Parallel()
	needs(t, "rpm")
	list := func(pattern string) (files []string) {
		for line := range strings.Lines(must(t, "rpm", "-qp", "--queryformat", "[%{FILEMODES:perms} %{FILEUSERNAME} %{FILENAMES}\n]", one(t, newer, pattern))) {
			f := strings.Fields(line)
			if f[1] != "root" {
				t.Errorf("not root's: %s", line)
			}
			files = append(files, f[0]+" "+f[2])
		}
		return files
	}
	host := list("belay-1*.rpm")
	sameContent(t, host, contentRPM)
	pages(t, host)
	sameContent(t, list("belay-guest-*.rpm"), contentGuest)
	// Flags: 1 is a configuration file, 16 one that is not replaced where it was changed.
	flags := must(t, "rpm", "-qp", "--queryformat", "[%{FILEFLAGS} %{FILENAMES}\n]", one(t, newer, "belay-1*.rpm"))
	for _, want := range []string{"17 /etc/belay/belayd.toml", "1 /etc/libvirt/hooks/qemu.d/belay", "0 /usr/sbin/belayd"} {
		if !strings.Contains(flags, want+"\n") {
			t.Errorf("no %q in\n%s", want, flags)
		}
	}
}

// The same sources make the same packages.
func TestReproducible(t *testing.T) {
	t.Parallel()
	again := t.TempDir()
	first := built(t, newer)
	build(t, newer, again)
	files, err := os.ReadDir(first)
	if err != nil || len(files) != 4 {
		t.Fatal(files, err)
	}
	for _, f := range files {
		a, err1 := os.ReadFile(filepath.Join(first, f.Name()))
		b, err2 := os.ReadFile(filepath.Join(again, f.Name()))
		if err := errors.Join(err1, err2); err != nil || !bytes.Equal(a, b) {
			t.Errorf("%s is not the same twice: %v", f.Name(), err)
		}
	}
}

// What the packages ask for of glibc is what the programs need of it, and they know
// which version they are.
func TestPrograms(t *testing.T) {
	t.Parallel()
	root := unpacked(t, "belay_*.deb")
	depends := must(t, "dpkg-deb", "-f", one(t, newer, "belay_*.deb"), "Depends")
	m := regexp.MustCompile(`libc6 \(>= 2\.(\d+)\)`).FindStringSubmatch(depends)
	if m == nil {
		t.Fatalf("it depends on %s", depends)
	}
	declared, _ := strconv.Atoi(m[1])
	for _, p := range []string{"/usr/bin/belay", "/usr/sbin/belayd", "/usr/sbin/belay-leash", "/usr/sbin/belay-kernel"} {
		f, err := elf.Open(root + p)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		symbols, err := f.ImportedSymbols()
		if err != nil && !errors.Is(err, elf.ErrNoSymbols) {
			t.Fatal(err)
		}
		for _, s := range symbols {
			var minor int
			if _, err := fmt.Sscanf(s.Version, "GLIBC_2.%d", &minor); err == nil && minor > declared {
				t.Errorf("%s needs %s of %s, the package asks for 2.%d", p, s.Name, s.Version, declared)
			}
		}
	}
	for program, want := range map[string]string{"/usr/bin/belay version": "", "/usr/sbin/belayd -version": "belayd ", "/usr/sbin/belay-leash -version": "belay-leash ", "/usr/sbin/belay-kernel -version": "belay-kernel "} {
		f := strings.Fields(root + program)
		if out, _ := output(t, []string{"BELAY_SOCKET=/nonexistent"}, f[0], f[1:]...); !strings.Contains(out, want+newer) {
			t.Errorf("%s: %s", program, out)
		}
	}
	if out := must(t, root+"/usr/sbin/belayd", "-config", root+"/etc/belay/belayd.toml", "-check"); !strings.Contains(out, ": ok, ") {
		t.Errorf("the configuration of the package: %s", out)
	}
}

// TestPages: the page of each program that people do not speak to has each of its flags, and
// reads as a page.
func TestPages(t *testing.T) {
	t.Parallel()
	root := unpacked(t, "belay_*.deb")
	for _, program := range []string{"belayd", "belay-leash", "belay-kernel"} {
		file := root + "/usr/share/man/man8/" + program + ".8.gz"
		text := strings.ReplaceAll(must(t, "zcat", file), `\-`, "-")
		help, _ := output(t, nil, root+"/usr/sbin/"+program, "-help")
		flags := regexp.MustCompile(`(?m)^  (-[a-z-]+)`).FindAllStringSubmatch(help, -1)
		if len(flags) < 2 {
			t.Fatalf("%s -help: %s", program, help)
		}
		for _, f := range flags {
			if !strings.Contains(text, "\n.TP\n.B "+f[1]) {
				t.Errorf("%s(8) has not %s", program, f[1])
			}
		}
		if _, err := exec.LookPath("groff"); err != nil {
			continue
		}
		if out, err := output(t, nil, "sh", "-c", "zcat "+file+" | groff -man -ww -z"); err != nil || out != "" {
			t.Errorf("%s(8): %v\n%s", program, err, out)
		}
	}
}

// TestCrash: systemd starts a belayd again that panics or that its watchdog ends with
// SIGABRT. By itself Go's runtime exits with 2 then, which is to prevent a restart.
func TestCrash(t *testing.T) {
	t.Parallel()
	root := unpacked(t, "belay_*.deb")
	unit, err := os.ReadFile(root + "/usr/lib/systemd/system/belayd.service")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "belayd") // short: a unix socket is in it
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	config := fmt.Sprintf("state_dir = %q\nrun_dir = %q\napi.socket = %q\nlibvirt.socket = %q\n", dir+"/state", dir+"/run", dir+"/sock", dir+"/none")
	if err := os.WriteFile(dir+"/belayd.toml", []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c := exec.CommandContext(ctx, root+"/usr/sbin/belayd", "-config", dir+"/belayd.toml")
	for _, m := range regexp.MustCompile(`(?m)^Environment=(.*)$`).FindAllSubmatch(unit, -1) {
		c.Env = append(c.Env, string(m[1]))
	}
	log, err := c.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewScanner(log); lines.Scan(); {
		if strings.Contains(lines.Text(), "belayd serves") {
			if err := c.Process.Signal(syscall.SIGABRT); err != nil {
				t.Error(err)
			}
		}
	}
	_ = c.Wait()
	if s := c.ProcessState.Sys().(syscall.WaitStatus); !s.Signaled() || s.Signal() != syscall.SIGABRT {
		t.Errorf("it ends with %s, and is not started again", c.ProcessState)
	}
}

// A belayd that cannot start fails for good, by systemd's count, and guests that wait in
// reserved memory are restored without it: so many starts fit into the interval, with as long
// between them as one takes to fail.
func TestGivenUpInTheEnd(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../belayd.service")
	if err != nil {
		t.Fatal(err)
	}
	value := func(key string) string {
		m := regexp.MustCompile(`(?m)^` + key + `=(.*)$`).FindSubmatch(text)
		if m == nil {
			t.Fatalf("it has no %s", key)
		}
		return string(m[1])
	}
	interval, err := time.ParseDuration(strings.TrimSuffix(value("StartLimitIntervalSec"), "in")) // "10min"
	between, err2 := time.ParseDuration(value("RestartSec"))
	burst, err3 := strconv.Atoi(value("StartLimitBurst"))
	if err := errors.Join(err, err2, err3); err != nil {
		t.Fatal(err)
	}
	if most := interval/time.Duration(burst) - between; most < 5*time.Second || value("OnFailure") != "belay-restore.service" {
		t.Errorf("%d starts, one each %s, in %s: one that takes more than %s to fail is started for ever", burst, between, interval, most)
	}
}

// The most that systemd-analyze security may find exposed, of 100.
const exposure = "45"

// TestUnits: systemd accepts the units as they are installed, their man pages are there,
// and their sandboxes hold.
func TestUnits(t *testing.T) {
	t.Parallel()
	needs(t, "systemd-analyze")
	for unit, pattern := range map[string]string{"belayd.service": "belay_*.deb", "belay-kernel@.service": "belay_*.deb",
		"belay-kernel.socket": "belay_*.deb", "belay-restore.service": "belay_*.deb", "belay-guest.service": "belay-guest_*.deb"} {
		root := unpacked(t, pattern)
		path := "/usr/lib/systemd/system/" + unit
		if err := errors.Join(os.MkdirAll(root+"/bin", 0o755), os.WriteFile(root+"/bin/kill", nil, 0o755)); err != nil { // that of procps
			t.Fatal(err)
		}
		if out, err := output(t, nil, "systemd-analyze", "verify", "--root="+root, "--man=no", "--recursive-errors=no", path); err != nil || out != "" {
			t.Errorf("%s: %v\n%s", unit, err, out)
		}
		if strings.HasSuffix(unit, ".socket") || unit == "belay-restore.service" {
			continue // the latter is to work where belayd does not, and has no sandbox
		}
		out, err := output(t, nil, "systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold="+exposure, "--root="+root, path)
		if err != nil || !strings.Contains(out, "→ Overall exposure level") {
			t.Errorf("%s: %v\n%s", unit, err, out)
			continue
		}
		t.Log(out[strings.LastIndex(out, "→"):])
	}
}
