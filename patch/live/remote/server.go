package remote

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"belay/patch/internal/linux"
)

// patience is how long an asker may take to begin, to end what it asks, or to read.
const patience = 10 * time.Second

// maxModule bounds a module, bytes.
const maxModule = 64 << 20

// Serve answers the requests of a connection, one after the other, until the asker hangs up.
// It serves root, and the users given. Those that went wrong are told to failed, beside the
// asker.
func Serve(ctx context.Context, conn *net.UnixConn, h Host, failed func(asked string, err error), users ...uint32) {
	defer conn.Close()
	uid, err := peer(conn)
	if err != nil {
		failed("", fmt.Errorf("cannot tell who asks: %w", err))
		return
	}
	if uid != 0 && !slices.Contains(users, uid) {
		err := fmt.Errorf("user %d may not ask", uid)
		failed("", errors.Join(err, reply(conn, err)))
		return
	}
	for wait := patience; ; wait = 0 { // only the first has to come at once
		r, module, err := read(conn, wait)
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil { // where the next one begins is not known
			failed(r.Do, errors.Join(err, reply(conn, err)))
			return
		}
		asked := r.Do + " " + r.Name
		if r.QEMU != nil {
			asked += r.QEMU.Guest
		}
		if gone(conn) { // it has given up, and must not be surprised by what comes of it
			failed(asked, errors.New("its asker has hung up before it was begun"))
			return
		}
		a := perform(ctx, h, r, module)
		if err := a.err(); err != nil {
			failed(asked, err)
		}
		if err := a.send(conn); err != nil {
			failed(asked, err)
			return
		}
	}
}

// gone reports whether the asker has closed the connection.
func gone(conn *net.UnixConn) (hungUp bool) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return true
	}
	err = raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd)}}
		n, err := unix.Poll(fds, 0)
		hungUp = err == nil && n > 0 && fds[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
	})
	return hungUp || err != nil
}

// reply tells the asker what is wrong with what it asks.
func reply(conn *net.UnixConn, err error) error {
	var a answer
	a.fail(err)
	return a.send(conn)
}

func (a answer) send(conn *net.UnixConn) error {
	if err := conn.SetWriteDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	return json.NewEncoder(conn).Encode(a)
}

// peer is the user at the other end (SO_PEERCRED).
func peer(conn *net.UnixConn) (uid uint32, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	if e := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); e != nil {
		return 0, e
	}
	if err != nil {
		return 0, err
	}
	return cred.Uid, nil
}

// read reads a request, which has to begin within a time, 0 for any, and the module or
// container that comes with a livepatch. io.EOF is that the asker has hung up.
func read(conn *net.UnixConn, within time.Duration) (r request, module []byte, err error) {
	var line []byte
	var files []*os.File
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	begin := time.Time{}
	if within > 0 {
		begin = time.Now().Add(within)
	}
	if err := conn.SetReadDeadline(begin); err != nil {
		return r, nil, err
	}
	buf, oob := make([]byte, 64<<10), make([]byte, unix.CmsgSpace(4*4))
	for !bytes.HasSuffix(line, []byte("\n")) {
		n, oobn, flags, _, err := conn.ReadMsgUnix(buf, oob)
		if len(line) == 0 {
			if n == 0 && err == nil || errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) {
				return r, nil, io.EOF
			}
			err = errors.Join(err, conn.SetReadDeadline(time.Now().Add(patience)))
		}
		if err != nil {
			return r, nil, fmt.Errorf("cannot read the request: %v", err) // not as io.EOF
		}
		received, err := rights(oob[:oobn])
		files = append(files, received...)
		if line = append(line, buf[:n]...); err != nil || flags&unix.MSG_CTRUNC != 0 || len(files) > 1 || len(line) > maxRequest || n == 0 {
			return r, nil, errors.Join(err, errors.New("the request is cut short, too long, or has more than one file with it"))
		}
	}
	d := json.NewDecoder(bytes.NewReader(line))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		return r, nil, fmt.Errorf("cannot read the request: %v", err) // not as io.EOF
	}
	if slices.Contains(withFile, r.Do) != (len(files) == 1) {
		return r, nil, errors.New("a livepatch has one file with it, and nothing else has")
	}
	if len(files) == 1 {
		// A copy of its own: what is judged is what is loaded, whoever writes to the file.
		if module, err = linux.ReadAll(files[0], maxModule); err != nil {
			return r, nil, fmt.Errorf("cannot read the module: %w", err)
		}
	}
	return r, module, nil
}

// rights are the files that have come with a message (SCM_RIGHTS).
func rights(oob []byte) (files []*os.File, err error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return files, err
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return files, nil
}
