package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/textproto"
	"strings"
	"time"
)

// printTimeout is how long the events are waited for.
const printTimeout = 15 * time.Second

// printEvents prints the guest's document in the form of Azure's Scheduled Events.
// It speaks HTTP/1.0 by hand: net/http would treble the program.
func printEvents(ctx context.Context, at netip.AddrPort, out io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, printTimeout)
	defer cancel()
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp4", at.String())
	if err != nil {
		return fmt.Errorf("cannot ask for events: nothing serves %s (start belay-guest): %w", at, err)
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	fmt.Fprintf(c, "GET /metadata/scheduledevents?api-version=2020-07-01 HTTP/1.0\r\nHost: 169.254.169.254\r\nMetadata: true\r\n\r\n")
	body, err := readAnswer(c)
	if err != nil {
		return fmt.Errorf("cannot ask for events: %w", cmp.Or(ctx.Err(), err))
	}
	var pretty bytes.Buffer
	if err := json.Indent(&pretty, body, "", "  "); err != nil {
		return fmt.Errorf("what %s answers is not a document of events: %w", at, err)
	}
	_, err = fmt.Fprintln(out, strings.TrimSpace(pretty.String()))
	return err
}

// maxAnswer is more than a document of events is, in bytes.
const maxAnswer = 1 << 20

// readAnswer reads an HTTP/1.0 answer, which ends with the connection.
func readAnswer(c io.Reader) ([]byte, error) {
	r := textproto.NewReader(bufio.NewReader(io.LimitReader(c, maxAnswer)))
	status, err := r.ReadLine()
	if err == nil {
		_, err = r.ReadMIMEHeader()
	}
	var body []byte
	if err == nil {
		body, err = io.ReadAll(r.R)
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, errors.New("the host does not answer (is belayd running there, and is this guest known to it?)")
	} else if err != nil {
		return nil, err
	}
	_, code, _ := strings.Cut(status, " ")
	if !strings.HasPrefix(status, "HTTP/1.") || !strings.HasPrefix(code, "200") {
		return nil, fmt.Errorf("the host answers %q: %s", code, bytes.TrimSpace(body))
	}
	return body, nil
}
