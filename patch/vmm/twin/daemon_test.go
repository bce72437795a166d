package twin

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// A QEMU that is started in the twin needs virtlogd, which may come up after libvirtd; a file that is left of
// its socket is not it.
func TestAwaitsOthers(t *testing.T) {
	t.Parallel()
	root, err := os.MkdirTemp("", "twin") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	socket := filepath.Join(root, "run", "virtlogd-sock")
	if err := os.MkdirAll(filepath.Dir(socket), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(socket, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	up := make(chan net.Listener, 1)
	go func() {
		time.Sleep(3 * pollEvery)
		_ = os.Remove(socket)
		l, err := net.Listen("unix", socket)
		if err != nil {
			t.Error(err)
		}
		up <- l
	}()
	begun := time.Now()
	place(root).awaitOthers(t.Context(), []string{"virtlogd"})
	if took := time.Since(begun); took < 3*pollEvery || took >= othersWithin {
		t.Errorf("it was waited for %s", took)
	}
	if l := <-up; l != nil {
		l.Close()
	}
	// It is not waited for when there is no time.
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	place(root).awaitOthers(gone, []string{"virtlogd"})
}
