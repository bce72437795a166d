package lab_test

import (
	"bufio"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"

	"belay/vmtests/lab"
)

// crash brings up a lab in a child process and kills that, without warning, the
// given time after its start, or as soon as the lab is up and has a guest.
func crash(t *testing.T, name string, after time.Duration) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childLab+"="+name)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	said := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(out).ReadString('\n')
		said <- line
	}()
	start, state := time.Now(), "still coming up"
	select {
	case line := <-said:
		if state = line; line != "up\n" {
			t.Errorf("child: %q", line)
		}
	case <-time.After(after):
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait() // "signal: killed"
	t.Logf("killed after %v: %s", time.Since(start), state)
}

func TestCrashedLabIsCleaned(t *testing.T) {
	needLab(t)
	t.Parallel()
	name := randomName()
	rounds := 2
	if os.Getenv("BELAY_LONG") != "" {
		rounds = 20
	}
	for range rounds {
		crash(t, name, time.Duration(rand.Int64N(int64(600*time.Millisecond))))
		l, err := lab.Up(t.Context(), lab.Config{Name: name})
		if err != nil {
			t.Fatal(err)
		}
		wantHosts(t, l)
		if err := l.Down(t.Context()); err != nil {
			t.Fatal(err)
		}
		wantNamedNothing(t, name)
	}

	// One that was all up, with a guest, is cleaned up by the Up of any other.
	crash(t, name, time.Minute)
	if _, err := lab.Open(name); err == nil {
		t.Error("opened a crashed lab")
	}
	up(t, lab.Config{Hosts: 1})
	wantNamedNothing(t, name)

	crash(t, name, time.Minute)
	within(t, time.Minute, func() error {
		// Another test's Up may be at it already.
		cleaned, err := lab.CleanCrashed(t.Context())
		if slices.Contains(cleaned, name) {
			t.Logf("cleaned %v", cleaned)
		}
		if err != nil {
			return err
		}
		_, err = os.Stat("/var/lib/belay-lab/" + name)
		if err == nil {
			return os.ErrExist
		}
		return nil
	})
	wantNamedNothing(t, name)
}
