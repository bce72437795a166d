package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/user"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
)

// Access says who has which role.
type Access struct {
	// Operators and Viewers on the unix socket: user names, "@group", or "*"
	// for everybody. root is always an operator.
	Operators, Viewers []string
	// OperatorCerts and ViewerCerts over TLS: certificate names.
	OperatorCerts, ViewerCerts []string
	// PeerCerts are the certificate names of the peer hosts.
	PeerCerts []string
}

type connKey struct{}

// connContext keeps the connection, for Unix to read its peer credentials.
func connContext(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, c)
}

// Unix identifies callers of the unix socket by SO_PEERCRED (unix(7)).
func (a Access) Unix(r *http.Request) Caller {
	conn, ok := r.Context().Value(connKey{}).(*net.UnixConn)
	if !ok {
		return Caller{Name: "unknown"}
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return Caller{Name: "unknown"}
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err != nil || credErr != nil {
		return Caller{Name: "unknown"}
	}
	return a.local(cred.Uid)
}

func (a Access) local(uid uint32) Caller {
	if uid == 0 {
		return Caller{Name: "root", Role: maint.RoleOperator}
	}
	id := strconv.FormatUint(uint64(uid), 10)
	c := Caller{Name: "uid:" + id}
	names := []string{"*"}
	if u, err := user.LookupId(id); err == nil {
		c.Name = u.Username
		names = append(names, u.Username)
		gids, err := u.GroupIds()
		if err != nil {
			gids = []string{u.Gid}
		}
		for _, gid := range gids {
			if g, err := user.LookupGroupId(gid); err == nil {
				names = append(names, "@"+g.Name)
			}
		}
	}
	listed := func(in []string) bool {
		return slices.ContainsFunc(names, func(n string) bool { return slices.Contains(in, n) })
	}
	switch {
	case listed(a.Operators):
		c.Role = maint.RoleOperator
	case listed(a.Viewers):
		c.Role = maint.RoleViewer
	}
	return c
}

// TLS identifies callers by the name in their verified certificate: a DNS
// name, or the common name where it has none.
func (a Access) TLS(r *http.Request) Caller {
	if r.TLS == nil || len(r.TLS.VerifiedChains) == 0 {
		return Caller{Name: "unknown"}
	}
	leaf := r.TLS.VerifiedChains[0][0]
	names := leaf.DNSNames
	if cn := leaf.Subject.CommonName; cn != "" && !slices.Contains(names, cn) {
		names = append(slices.Clone(names), cn)
	}
	for _, n := range names {
		switch {
		case slices.Contains(a.PeerCerts, n):
			return Caller{Name: n, Role: maint.RolePeer}
		case slices.Contains(a.OperatorCerts, n):
			return Caller{Name: "cert:" + n, Role: maint.RoleOperator}
		case slices.Contains(a.ViewerCerts, n):
			return Caller{Name: "cert:" + n, Role: maint.RoleViewer}
		}
	}
	if len(names) == 0 {
		return Caller{Name: "cert without a name"}
	}
	return Caller{Name: "cert:" + names[0]}
}

// decodeStrict decodes one JSON value and refuses unknown fields and anything
// after it.
func decodeStrict(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		if errors.Is(err, io.EOF) {
			return errors.New("it is empty")
		}
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("something follows the JSON object, at byte %d", d.InputOffset())
	}
	return nil
}
