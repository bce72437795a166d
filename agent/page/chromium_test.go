package page_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// chromium is a headless Chromium, spoken to by the DevTools protocol over a pair of pipes
// (--remote-debugging-pipe): JSON texts that end with a NUL each. That it can show what is
// in a page needs no JavaScript in it.
type chromium struct {
	t       *testing.T
	out     *os.File
	in      *bufio.Reader
	last    int
	session string
	stderr  strings.Builder
}

// message is what goes either way.
type message struct {
	ID      int             `json:"id,omitempty"`
	Session string          `json:"sessionId,omitempty"`
	Method  string          `json:"method,omitempty"`
	Params  any             `json:"params,omitempty"`
	Result  json.RawMessage `json:"result,omitempty"`
	Error   json.RawMessage `json:"error,omitempty"`
}

// patience is far more than a page takes, on a busy machine too.
const patience = time.Minute

// newChromium skips the test unless $BELAY_BROWSER names a Chromium: make test-page does.
func newChromium(t *testing.T, flags ...string) *chromium {
	t.Helper()
	program := os.Getenv("BELAY_BROWSER")
	if program == "" {
		t.Skip("BELAY_BROWSER names no Chromium; see make test-page")
	}
	b := &chromium{t: t}
	theirs, out, err := os.Pipe()
	must(t, err)
	in, theirsToo, err := os.Pipe()
	must(t, err)
	b.out, b.in = out, bufio.NewReader(in)
	profile, err := os.MkdirTemp("", "belay-browser")
	must(t, err)
	c := exec.Command(program, append([]string{"--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
		"--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--user-data-dir=" + profile, "--remote-debugging-pipe"}, flags...)...)
	c.ExtraFiles = []*os.File{theirs, theirsToo} // 3 and 4
	c.Stderr, c.WaitDelay = &b.stderr, 5*time.Second
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // it has many processes
	must(t, c.Start())
	must(t, errors.Join(theirs.Close(), theirsToo.Close()))
	t.Cleanup(func() {
		_ = syscall.Kill(-c.Process.Pid, syscall.SIGKILL) // all that it has is in the folder
		_ = c.Wait()
		_ = errors.Join(out.Close(), in.Close())
		for range 100 { // nobody says when the last of its processes is gone, which may yet write
			if err = os.RemoveAll(profile); err == nil {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
		t.Error(err)
	})
	must(t, in.SetReadDeadline(time.Now().Add(2*patience)))
	var target struct {
		ID string `json:"targetId"`
	}
	b.call("Target.createTarget", map[string]any{"url": "about:blank", "width": 1200, "height": 1600}, &target)
	var attached struct {
		Session string `json:"sessionId"`
	}
	b.call("Target.attachToTarget", map[string]any{"targetId": target.ID, "flatten": true}, &attached)
	b.session = attached.Session
	b.call("Page.enable", nil, nil)
	return b
}

// call asks for something to be done, and waits for the answer.
func (b *chromium) call(method string, params, answer any) {
	b.t.Helper()
	b.last++
	if params == nil {
		params = struct{}{}
	}
	text, err := json.Marshal(message{ID: b.last, Session: b.session, Method: method, Params: params})
	must(b.t, err)
	_, err = b.out.Write(append(text, 0))
	must(b.t, err)
	id := b.last
	m := b.await(func(m message) bool { return m.ID == id })
	if m.Error != nil {
		b.t.Fatalf("%s: %s", method, m.Error)
	}
	if answer != nil {
		must(b.t, json.Unmarshal(m.Result, answer))
	}
}

// await gives the next message of a kind.
func (b *chromium) await(is func(message) bool) message {
	b.t.Helper()
	for {
		text, err := b.in.ReadBytes(0)
		if err != nil {
			if errors.Is(err, io.EOF) {
				b.t.Fatalf("Chromium has ended: %s", &b.stderr)
			}
			b.t.Fatal(err)
		}
		var m message
		must(b.t, json.Unmarshal(text[:len(text)-1], &m))
		if is(m) {
			return m
		}
	}
}

// scripts has pages that are loaded from now on run theirs, or not.
func (b *chromium) scripts(run bool) {
	b.t.Helper()
	b.call("Emulation.setScriptExecutionDisabled", map[string]any{"value": !run}, nil)
}

// load goes to a page and waits until it is there.
func (b *chromium) load(url string) {
	b.t.Helper()
	var to struct {
		Error string `json:"errorText"`
	}
	b.call("Page.navigate", map[string]any{"url": url}, &to)
	if to.Error != "" {
		b.t.Fatalf("%s: %s", url, to.Error)
	}
	b.loaded()
}

// loaded waits until a page has been loaded, which it may be by itself.
func (b *chromium) loaded() {
	b.t.Helper()
	b.await(func(m message) bool { return m.Method == "Page.loadEventFired" })
}

// see gives a page as the browser has it.
func (b *chromium) see(url string) string {
	b.t.Helper()
	b.load(url)
	var document struct {
		Root struct {
			ID int `json:"nodeId"`
		} `json:"root"`
	}
	b.call("DOM.getDocument", map[string]any{"depth": 0}, &document)
	var page struct {
		HTML string `json:"outerHTML"`
	}
	b.call("DOM.getOuterHTML", map[string]any{"nodeId": document.Root.ID}, &page)
	return page.HTML
}

// picture is what a page looks like, as PNG.
func (b *chromium) picture() (png []byte) {
	b.t.Helper()
	var shot struct {
		Data []byte `json:"data"`
	}
	b.call("Page.captureScreenshot", nil, &shot)
	return shot.Data
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
