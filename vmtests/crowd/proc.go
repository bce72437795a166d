package crowd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
)

// Server is a process that answers the guests of a crowd.
type Server struct {
	crowd   *Crowd
	address string
	cmd     *exec.Cmd
	orders  io.WriteCloser
	answers *json.Decoder
	forget  func() bool
}

// Belay starts one with Belay's own: views on a board with a journal, behind a gate
// that knows all guests of the crowd.
func (c *Crowd) Belay(ctx context.Context) (*Server, error) {
	return c.start(ctx, serviceAddress, setup{Ports: c.Ports})
}

// Plain starts one that gives everybody the same answer of n bytes with
// net/http, and knows nothing of guests.
func (c *Crowd) Plain(ctx context.Context, n int) (*Server, error) {
	return c.start(ctx, plainAddress, setup{Plain: n})
}

func (c *Crowd) start(ctx context.Context, address string, with setup) (*Server, error) {
	s := &Server{crowd: c, address: address, cmd: exec.Command("/proc/self/exe", serverArg)}
	s.cmd.Stderr = os.Stderr
	orders, err := s.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	s.orders, s.answers = orders, json.NewDecoder(out)
	if err := in(c.host, s.cmd.Start); err != nil { // it inherits the thread's namespace
		return nil, err
	}
	s.forget = context.AfterFunc(ctx, func() { orders.Close() })
	if _, err := s.tell(with); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// PID is the process.
func (s *Server) PID() int { return s.cmd.Process.Pid }

func (s *Server) tell(what any) ([]Told, error) {
	if err := json.NewEncoder(s.orders).Encode(what); err != nil {
		return nil, fmt.Errorf("cannot tell the server what to do: %w", err)
	}
	var d done
	if err := s.answers.Decode(&d); err != nil {
		return nil, fmt.Errorf("the server has ended: %w", err)
	}
	if d.Error != "" {
		return nil, errors.New(d.Error)
	}
	return d.Told, nil
}

// Close ends it, and waits until it has ended.
func (s *Server) Close() error {
	s.forget()
	return errors.Join(ignoreClosed(s.orders.Close()), s.cmd.Wait())
}

func ignoreClosed(err error) error {
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// Announce tells guests of an event each, one after the other.
func (s *Server) Announce(guests ...int) error {
	_, err := s.tell(order{Announce: guests})
	return err
}
