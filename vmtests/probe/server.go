package probe

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
)

// maxLine is the longest request, in bytes.
const maxLine = 64 << 10

// Server answers requests. All fields must be set.
type Server struct {
	Log         *slog.Logger
	Guest       string
	Incarnation uint64
	Memory      *Memory
	Disk        *Disk
	Sender      *Sender
	Clock       *Clock
	KmsgPath    string // /dev/kmsg
	ProcRoot    string // /proc
	SysRoot     string // /sys
}

// Serve answers the requests that come from rw until reading fails; the error
// is nil at the end of a stream. Requests run side by side, so a status is
// answered while a verify is under way. A line that is no request is dropped:
// it is what a client which was cut off left behind.
func (s *Server) Serve(rw io.ReadWriter) error {
	r := bufio.NewReaderSize(rw, maxLine)
	var wg sync.WaitGroup
	defer wg.Wait()
	var mu sync.Mutex // one reply at a time
	for {
		line, err := r.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			s.Log.Warn("request line is too long", "max_bytes", maxLine)
			for errors.Is(err, bufio.ErrBufferFull) {
				_, err = r.ReadSlice('\n')
			}
			line = nil
		}
		var req Request
		if len(bytes.TrimSpace(line)) > 0 {
			if jerr := json.Unmarshal(line, &req); jerr != nil {
				s.Log.Warn("dropped a line that is no request", "err", jerr)
			} else {
				wg.Go(func() { s.reply(rw, &mu, req) })
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// reply runs one request and writes its answer. The line break in front ends
// whatever a cut-off answer left in the client's stream.
func (s *Server) reply(w io.Writer, mu *sync.Mutex, req Request) {
	out := Reply{ID: req.ID}
	result, err := s.call(req)
	if err == nil && result != nil {
		out.Result, err = json.Marshal(result)
	}
	if err != nil {
		out.Error = err.Error()
		s.Log.Error("request failed", "cmd", req.Cmd, "err", err)
	}
	b, err := json.Marshal(out)
	if err != nil {
		s.Log.Error("cannot encode reply", "cmd", req.Cmd, "err", err)
		return
	}
	b = append(append([]byte{'\n'}, b...), '\n')
	mu.Lock()
	defer mu.Unlock()
	if _, err := w.Write(b); err != nil {
		s.Log.Warn("reply not delivered", "cmd", req.Cmd, "err", err)
	}
}

// call is the table of commands.
func (s *Server) call(req Request) (any, error) {
	switch req.Cmd {
	case CmdStatus:
		return s.status(), nil
	case CmdDirty:
		return with(req, func(c DirtySettings) (any, error) {
			err := s.Memory.Set(c)
			return s.Memory.Status(), err
		})
	case CmdVerify:
		return s.Memory.Verify(), nil
	case CmdCorrupt:
		return with(req, func(c CorruptSettings) (any, error) { return nil, s.Memory.Corrupt(c) })
	case CmdDiskWrite:
		return with(req, func(c DiskSettings) (any, error) { return s.Disk.Write(c) })
	case CmdDiskVerify:
		return with(req, func(c DiskSettings) (any, error) { return s.Disk.Verify(c) })
	case CmdHeartbeat:
		return with(req, func(c HeartbeatSettings) (any, error) {
			err := s.Sender.Set(c)
			return s.Sender.Status(), err
		})
	case CmdKmsg:
		return Kmsg(s.KmsgPath)
	case CmdClock:
		return s.Clock.Read(), nil
	}
	return nil, fmt.Errorf("unknown command %q", req.Cmd)
}

// with decodes a request's arguments for f.
func with[T any](req Request, f func(T) (any, error)) (any, error) {
	var args T
	if err := json.Unmarshal(req.Args, &args); err != nil {
		return nil, fmt.Errorf("arguments of %s: %w", req.Cmd, err)
	}
	return f(args)
}

func (s *Server) status() Status {
	return Status{
		Guest:       s.Guest,
		BootID:      readLine(s.ProcRoot + "/sys/kernel/random/boot_id"),
		Incarnation: s.Incarnation,
		Uptime:      boottime(),
		Monotonic:   monotonic(),
		Wall:        wall(),
		ClockSource: readLine(s.SysRoot + "/devices/system/clocksource/clocksource0/current_clocksource"),
		Heartbeat:   s.Sender.Status(),
		Memory:      s.Memory.Status(),
		Disk:        s.Disk.Present(),
	}
}
