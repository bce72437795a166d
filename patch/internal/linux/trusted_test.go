package linux_test

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"belay/patch/internal/linux"
)

// What is trusted is the very file that is opened, by where it is.
func TestOpenTrusted(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		// spoil changes what is at dir/file, and gives what is opened.
		spoil   func(dir, file string) (string, error)
		trusted bool
		root    bool // who is not cannot make it
	}{
		"root's":        {func(_, f string) (string, error) { return f, nil }, true, false},
		"a folder":      {func(d, _ string) (string, error) { return d, nil }, true, false},
		"relative":      {func(_, f string) (string, error) { return filepath.Rel("/", f) }, false, false},
		"not there":     {func(_, f string) (string, error) { return f + "x", nil }, false, false},
		"group's":       {func(_, f string) (string, error) { return f, os.Chmod(f, 0o664) }, false, false},
		"everybody's":   {func(_, f string) (string, error) { return f, os.Chmod(f, 0o646) }, false, false},
		"group's place": {func(d, f string) (string, error) { return f, os.Chmod(d, 0o770) }, false, false},
		"sticky place":  {func(d, f string) (string, error) { return f, os.Chmod(d, 0o777|os.ModeSticky) }, true, false},
		"sticky itself": {func(d, _ string) (string, error) { return d, os.Chmod(d, 0o777|os.ModeSticky) }, false, false},
		"another's":     {func(_, f string) (string, error) { return f, os.Chown(f, 1000, 0) }, false, true},
		"in another's":  {func(d, f string) (string, error) { return f, os.Chown(d, 1000, 0) }, false, true},
		"a pipe": {func(d, _ string) (string, error) {
			return filepath.Join(d, "pipe"), unix.Mkfifo(filepath.Join(d, "pipe"), 0o600)
		}, true, false}, // who reads it sees that it is no file
		// The link is in others' hands, what it leads to is not.
		"a link": {func(d, f string) (string, error) {
			other := filepath.Join(filepath.Dir(d), "other")
			link := filepath.Join(other, "link")
			if err := os.Mkdir(other, 0o777); err != nil {
				return link, err
			}
			return link, os.Symlink(f, link)
		}, true, false},
		"a link to others' place": {func(d, f string) (string, error) {
			link := filepath.Join(filepath.Dir(d), "link")
			if err := os.Symlink(f, link); err != nil {
				return link, err
			}
			return link, os.Chmod(d, 0o777)
		}, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if c.root && os.Geteuid() != 0 {
				t.Skip("only root can give files away")
			}
			dir := filepath.Join(t.TempDir(), "place")
			file := filepath.Join(dir, "file")
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, []byte("text"), 0o644); err != nil {
				t.Fatal(err)
			}
			path, err := c.spoil(dir, file)
			if err != nil {
				t.Fatal(err)
			}
			f, err := linux.OpenTrusted(path)
			if (err == nil) != c.trusted {
				t.Errorf("%v, want trusted: %v", err, c.trusted)
			}
			if err == nil {
				f.Close()
			}
		})
	}
}

// A link that goes to and fro between what is root's and what is not never has the latter
// be taken for the former.
func TestExchangedWhileOpened(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	good, bad, link := filepath.Join(dir, "good"), filepath.Join(dir, "bad"), filepath.Join(dir, "link")
	for name, mode := range map[string]os.FileMode{good: 0o644, bad: 0o666} {
		if err := os.WriteFile(name, []byte(name), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(name, mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(good, link); err != nil {
		t.Fatal(err)
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			_ = os.Symlink([]string{bad, good}[i%2], link+"~")
			_ = os.Rename(link+"~", link)
		}
	}()
	opened := 0
	for range 5000 {
		f, err := linux.OpenTrusted(link)
		if err != nil {
			continue
		}
		opened++
		b, err := linux.ReadAll(f, 1<<10)
		f.Close()
		if err != nil || string(b) != good {
			t.Fatalf("%s is trusted, %v", b, err)
		}
	}
	close(stop)
	<-stopped
	if opened == 0 {
		t.Error("it was never opened")
	}
}
