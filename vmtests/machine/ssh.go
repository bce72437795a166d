package machine

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
)

const (
	// bannerTimeout is how long sshd may take to greet: QEMU accepts connections for a host
	// that is not up.
	bannerTimeout = 5 * time.Second
	// loginTimeout is the same for the rest, on an emulated and busy processor.
	loginTimeout = 30 * time.Second
	// A connection on which nothing is heard for aliveTimeout, asked every aliveEvery, is
	// given up: the host may have another kernel now.
	aliveEvery, aliveTimeout = 2 * time.Second, 30 * time.Second
	// upPoll is how often a host is tried that boots.
	upPoll = 500 * time.Millisecond
)

// Result is how a program ended in a host.
type Result struct {
	Code           int
	Stdout, Stderr string
}

// connect returns the connection to the host's sshd, and makes one if there is none.
func (h *Host) connect(ctx context.Context) (*ssh.Client, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.client != nil {
		return h.client, nil
	}
	c, err := h.login(ctx)
	if err != nil {
		return nil, fmt.Errorf("cannot reach %s: %w", h.Name, err)
	}
	h.client = c
	go func() {
		_ = c.Wait() // why it ended is told to who used it
		h.forget(c)
	}()
	go keepAlive(c)
	return c, nil
}

func (h *Host) login(ctx context.Context) (*ssh.Client, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", h.control)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	fail := func(err error) (*ssh.Client, error) {
		return nil, errors.Join(err, conn.Close(), context.Cause(ctx))
	}
	if err := conn.SetDeadline(time.Now().Add(bannerTimeout)); err != nil {
		return fail(err)
	}
	first := make([]byte, 1)
	if _, err := io.ReadFull(conn, first); err != nil {
		return fail(err)
	}
	if err := conn.SetDeadline(time.Now().Add(loginTimeout)); err != nil {
		return fail(err)
	}
	c, channels, requests, err := ssh.NewClientConn(&greeted{conn, bytes.NewReader(first)}, h.control, h.lab.login)
	if err != nil {
		return fail(err)
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return fail(err)
	}
	return ssh.NewClient(c, channels, requests), nil
}

// greeted is a connection whose first bytes were read already.
type greeted struct {
	net.Conn
	first *bytes.Reader
}

func (g *greeted) Read(b []byte) (int, error) {
	if g.first.Len() > 0 {
		return g.first.Read(b)
	}
	return g.Conn.Read(b)
}

func keepAlive(c *ssh.Client) {
	for {
		answered := make(chan error, 1)
		go func() {
			_, _, err := c.SendRequest("keepalive@openssh.com", true, nil)
			answered <- err
		}()
		select {
		case err := <-answered:
			if err != nil {
				return
			}
		case <-time.After(aliveTimeout):
			c.Close()
			return
		}
		time.Sleep(aliveEvery)
	}
}

// drop ends a connection, forget drops one that has ended.
func (h *Host) drop(c *ssh.Client) {
	c.Close() // it may be dead already
	h.forget(c)
}

func (h *Host) forget(c *ssh.Client) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.client == c {
		h.client = nil
	}
}

func (h *Host) disconnect() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.client != nil {
		h.client.Close() // it may be dead already
		h.client = nil
	}
}

// Exec runs a program in the host, as root, in root's home, and tells how it ended. The error
// is of the way there, or of ctx; then the program has been killed, if the host is there.
func (h *Host) Exec(ctx context.Context, args ...string) (Result, error) {
	return h.exec(ctx, nil, args...)
}

// Run is [Host.Exec] of a program that is to end with 0; it returns its standard output.
func (h *Host) Run(ctx context.Context, args ...string) (string, error) {
	return h.runWith(ctx, nil, args...)
}

// Script runs a shell's script (sh -eu) in the host; else as Run.
func (h *Host) Script(ctx context.Context, script string) (string, error) {
	return h.runWith(ctx, strings.NewReader(script), "sh", "-eu", "-s")
}

// Belay runs the operator's CLI in the host.
func (h *Host) Belay(ctx context.Context, args ...string) (Result, error) {
	return h.Exec(ctx, append([]string{"belay"}, args...)...)
}

// BelayJSON runs belay with -o json and decodes what it prints, whatever code it ends with.
func (h *Host) BelayJSON(ctx context.Context, v any, args ...string) (Result, error) {
	r, err := h.Belay(ctx, append([]string{"-o", "json"}, args...)...)
	if err == nil {
		err = json.Unmarshal([]byte(r.Stdout), v)
	}
	return r, err
}

func (h *Host) runWith(ctx context.Context, stdin io.Reader, args ...string) (string, error) {
	r, err := h.exec(ctx, stdin, args...)
	if err == nil && r.Code != 0 {
		err = fmt.Errorf("%s: %s ended with %d: %s", h.Name, strings.Join(args, " "), r.Code, strings.TrimSpace(r.Stderr+r.Stdout))
	}
	return r.Stdout, err
}

func (h *Host) exec(ctx context.Context, stdin io.Reader, args ...string) (Result, error) {
	var r Result
	fail := func(err error) (Result, error) {
		return r, fmt.Errorf("%s: %s: %w", h.Name, strings.Join(args, " "), err)
	}
	c, err := h.connect(ctx)
	if err != nil {
		return fail(err)
	}
	quoted := make([]string, len(args))
	for i, a := range args {
		quoted[i] = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
	}
	var stdout, stderr bytes.Buffer
	begun, done := make(chan *ssh.Session, 1), make(chan error, 1)
	go func() { // nothing of it heeds ctx
		s, err := c.NewSession()
		if err != nil {
			done <- err
			return
		}
		begun <- s
		s.Stdin, s.Stdout, s.Stderr = stdin, &stdout, &stderr
		done <- s.Run(strings.Join(quoted, " "))
		s.Close() // in vain where Run has ended well
	}()
	select {
	case err = <-done:
	case <-ctx.Done():
		select {
		case s := <-begun:
			_ = s.Signal(ssh.SIGKILL) // the host may be gone
			s.Close()
		default: // the connection is dead
			h.drop(c)
		}
		return fail(context.Cause(ctx))
	}
	r.Stdout, r.Stderr = stdout.String(), stderr.String()
	var exit *ssh.ExitError
	if errors.As(err, &exit) && exit.Signal() == "" {
		r.Code = exit.ExitStatus()
		return r, nil
	}
	if err != nil {
		return fail(err)
	}
	return r, nil
}

// Copy puts a file of this machine into the host, with its permissions.
func (h *Host) Copy(ctx context.Context, from, to string) error {
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	_, err = h.runWith(ctx, f, "sh", "-c", fmt.Sprintf(`mkdir -p "$(dirname "$1")" && cat >"$1" && chmod %o "$1"`, st.Mode().Perm()), "sh", to)
	return err
}

// ReadFile reads a file of the host.
func (h *Host) ReadFile(ctx context.Context, path string) ([]byte, error) {
	text, err := h.Run(ctx, "cat", path)
	return []byte(text), err
}

// SSH is a command by which a person logs in.
func (h *Host) SSH() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	host, port, _ := net.SplitHostPort(h.control) // it was joined here
	return fmt.Sprintf("ssh -i %s -p %s -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null root@%s", h.lab.Image.key(), port, host)
}

// BootID is the host's, other after every boot and kexec.
func (h *Host) BootID(ctx context.Context) (string, error) {
	id, err := h.Run(ctx, "cat", "/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(id), err
}

// tryBootID does not wait long for a host that had another kernel when it was last spoken to.
func (h *Host) tryBootID(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, loginTimeout)
	defer cancel()
	return h.BootID(ctx)
}

// AwaitUp waits until the host can be spoken to and has another boot ID than the given one,
// which may be empty; it returns that. It says so when the host's kernel has panicked
// meanwhile.
func (h *Host) AwaitUp(ctx context.Context, otherThan string) (bootID string, err error) {
	begin, seen := time.Now(), len(h.panics())
	for {
		id, err := h.tryBootID(ctx)
		if err == nil && id != otherThan {
			return id, nil
		}
		if err == nil {
			err = errors.New("it has not gone down")
		}
		if p := h.panics(); len(p) > seen {
			err = fmt.Errorf("its kernel has panicked: %s: %w", p[len(p)-1], err)
		}
		if h.dead() {
			return "", fmt.Errorf("%s does not come up: its QEMU has ended: %s", h.Name, h.qemuLog())
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("%s does not come up in %v: %w", h.Name, time.Since(begin).Round(time.Second), err)
		case <-time.After(upPoll):
		}
	}
}
