package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"belay/vmtests/lab"
)

// labStatus is the shape of status -o json.
type labStatus struct {
	Name   string       `json:"name"`
	Dir    string       `json:"dir"`
	Shared string       `json:"shared"`
	TLS    bool         `json:"tls"`
	CAFile string       `json:"ca_file"`
	Hosts  []hostStatus `json:"hosts"`
}

type hostStatus struct {
	Name    string `json:"name"`
	Addr    string `json:"addr"`
	UUID    string `json:"uuid"`
	Dir     string `json:"dir"`
	Socket  string `json:"socket"`
	URI     string `json:"uri"`
	PeerURI string `json:"peer_uri"`
	// Daemons are the process IDs of those that run.
	Daemons map[lab.Daemon]int `json:"daemons"`
	Guests  []guestStatus      `json:"guests"`
	// Error says why libvirtd did not name its guests.
	Error string `json:"error,omitempty"`
}

type guestStatus struct {
	Name  string `json:"name"`
	State string `json:"state"`
}

func statusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show a lab's hosts, their daemons and guests",
		Args:  usage(cobra.NoArgs),
	}
	name := nameFlag(cmd)
	output := cmd.Flags().StringP("output", "o", "text", "text or json")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if !slices.Contains([]string{"text", "json"}, *output) {
			return errUsage{fmt.Errorf("unknown output %q: use text or json", *output)}
		}
		l, err := lab.Open(*name)
		if err != nil {
			return err
		}
		s, err := status(cmd.Context(), l)
		if err != nil {
			return err
		}
		if *output == "json" {
			e := json.NewEncoder(os.Stdout)
			e.SetIndent("", "  ")
			return e.Encode(s)
		}
		return s.print(os.Stdout)
	}
	return cmd
}

func status(ctx context.Context, l *lab.Lab) (*labStatus, error) {
	s := &labStatus{Name: l.Name, Dir: l.Dir, Shared: l.Shared, TLS: l.TLS, CAFile: l.CAFile()}
	for _, h := range l.Hosts {
		hs := hostStatus{
			Name:    h.Name,
			Addr:    h.Addr.String(),
			UUID:    h.UUID,
			Dir:     h.Dir,
			Socket:  h.LibvirtSocket(),
			URI:     h.URI(),
			PeerURI: h.PeerURI(l.TLS),
			Daemons: map[lab.Daemon]int{},
			Guests:  []guestStatus{},
		}
		for _, d := range lab.Daemons() {
			pid, err := h.DaemonPID(d)
			if err != nil {
				return nil, err
			}
			if pid != 0 {
				hs.Daemons[d] = pid
			}
		}
		var err error
		if hs.Guests, err = guests(ctx, h, hs.Guests); err != nil {
			hs.Error = err.Error()
		}
		s.Hosts = append(s.Hosts, hs)
	}
	return s, nil
}

// guests appends the host's guests: names first, since a name may hold spaces
// and virsh's table cannot be taken apart then.
func guests(ctx context.Context, h *lab.Host, list []guestStatus) ([]guestStatus, error) {
	names, err := h.Virsh(ctx, "list", "--all", "--name")
	if err != nil {
		return list, err
	}
	for name := range strings.Lines(names) {
		name = strings.TrimSuffix(name, "\n")
		if name == "" {
			continue
		}
		state, err := h.Virsh(ctx, "domstate", "--domain", name)
		if err != nil {
			return list, err
		}
		list = append(list, guestStatus{name, strings.TrimSpace(state)})
	}
	return list, nil
}

func (s *labStatus) print(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "HOST\tADDRESS\tDAEMONS\tGUESTS\tURI")
	for _, h := range s.Hosts {
		var daemons, guests []string
		for _, d := range lab.Daemons() {
			if h.Daemons[d] == 0 {
				daemons = append(daemons, "no "+string(d))
			}
		}
		if len(daemons) == 0 {
			daemons = []string{"all run"}
		}
		for _, g := range h.Guests {
			guests = append(guests, g.Name+" ("+g.State+")")
		}
		if h.Error != "" {
			guests = append(guests, "?")
		}
		if len(guests) == 0 {
			guests = []string{"-"}
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", h.Name, h.Addr,
			strings.Join(daemons, ", "), strings.Join(guests, ", "), h.URI)
	}
	return w.Flush()
}
