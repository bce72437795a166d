package remote

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"belay/patch/internal/linux"
)

// patience is how long an asker may take to ask, or to read.
const patience = 10 * time.Second

// maxModule bounds a module, bytes.
const maxModule = 64 << 20

// Serve answers the one request of a connection. It serves root, and the users given.
func Serve(ctx context.Context, conn *net.UnixConn, h Host, users ...uint32) (asked string, err error) {
	defer conn.Close()
	if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	uid, err := peer(conn)
	if err != nil {
		return "", fmt.Errorf("cannot tell who asks: %w", err)
	}
	var a answer
	if uid != 0 && !slices.Contains(users, uid) {
		err = fmt.Errorf("user %d may not ask", uid)
		a.fail(err)
	} else {
		var r request
		var module []byte
		if r, module, err = read(conn); err != nil {
			a.fail(err)
		} else {
			a = perform(ctx, h, r, module)
			err = a.err()
		}
		if asked = r.Do + " " + r.Name; r.QEMU != nil {
			asked += r.QEMU.Guest
		}
	}
	if e := conn.SetWriteDeadline(time.Now().Add(patience)); e != nil {
		return asked, e
	}
	return asked, errors.Join(err, json.NewEncoder(conn).Encode(a))
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

// read reads a request, and the module or container that comes with a livepatch.
func read(conn *net.UnixConn) (r request, module []byte, err error) {
	var line []byte
	var files []*os.File
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	buf, oob := make([]byte, 64<<10), make([]byte, unix.CmsgSpace(4*4))
	for !bytes.HasSuffix(line, []byte("\n")) {
		n, oobn, flags, _, err := conn.ReadMsgUnix(buf, oob)
		if err != nil {
			return r, nil, fmt.Errorf("cannot read the request: %w", err)
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
		return r, nil, fmt.Errorf("cannot read the request: %w", err)
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
