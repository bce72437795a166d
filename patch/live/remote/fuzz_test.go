package remote_test

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/patch/live"
	"belay/patch/live/remote"
)

// asked is a host that notes what it is to do, and does nothing.
type asked struct{ did []string }

func (a *asked) note(what string) error { a.did = append(a.did, what); return nil }

func (a *asked) Load(context.Context, live.Artifact) error          { return a.note("load") }
func (a *asked) Enable(_ context.Context, n string, _ bool) error   { return a.note("enable " + n) }
func (a *asked) Unload(_ context.Context, n string) error           { return a.note("unload " + n) }
func (a *asked) ReloadMicrocode(context.Context) error              { return a.note("microcode") }
func (a *asked) KexecUnload(context.Context) error                  { return a.note("kexec-unload") }
func (a *asked) KexecLoad(context.Context, maint.KernelImage) error { return a.note("kexec-load") }
func (a *asked) Tasks(context.Context, []string) ([]maint.KernelTask, error) {
	return nil, a.note("tasks")
}
func (a *asked) KernelLog(context.Context, uint64) ([]live.Line, error) { return nil, a.note("log") }
func (a *asked) LogEnd(context.Context) (uint64, error)                 { return 0, a.note("log-end") }

// FuzzServe: whatever comes, there is one answer, one thing is done at most, and only what a
// request asks for that reads as one.
func FuzzServe(f *testing.F) {
	for _, s := range []string{`{"do":"load"}`, `{"do":"unload","name":"a"}`, `{"do":"kexec-load","image":{"kernel":"/a"}}`, `{"do":"kexec-load"}`,
		`{"do":"tasks","functions":["a"]}{"do":"unload"}`, "{\"do\":\"log\"}\n{\"do\":\"microcode\"}", `{"Do":"MICROCODE"}`, `[]`, ``} {
		f.Add([]byte(s), 0)
		f.Add([]byte(s), 1)
	}
	f.Fuzz(func(t *testing.T, text []byte, files int) {
		if len(text) > 100<<10 { // more than a socket takes at once
			return
		}
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		here, there := conn(t, fds[0]), conn(t, fds[1])
		defer here.Close()
		var rights []byte
		if n := files % 4; n > 0 {
			rights = unix.UnixRights([]int{0, 1, 2}[:n]...)
		}
		if _, _, err := here.WriteMsgUnix(append(text, '\n'), rights, nil); err != nil {
			t.Fatal(err)
		}
		if err := here.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		h := new(asked)
		what := ""
		remote.Serve(t.Context(), there, h, func(asked string, e error) { what, err = asked, e }, uint32(os.Getuid()))
		var answer struct{ Error string }
		d := json.NewDecoder(here)
		if e := d.Decode(&answer); e != nil || d.More() {
			t.Fatalf("%q: no answer, or more than one: %v", text, e)
		}
		if (err == nil) != (answer.Error == "") || len(h.did) > 1 || err == nil && len(h.did) != 1 {
			t.Errorf("%q: %s, %v; answered %q; done: %v", text, what, err, answer.Error, h.did)
		}
		var one struct{ Do string }
		if len(h.did) == 1 && json.NewDecoder(bytes.NewReader(text)).Decode(&one) != nil {
			t.Errorf("%q is no request, and done is %v", text, h.did)
		}
	})
}

func conn(t *testing.T, fd int) *net.UnixConn {
	t.Helper()
	f := os.NewFile(uintptr(fd), "socket")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	return c.(*net.UnixConn)
}
