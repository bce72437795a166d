package api

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/net/netutil"
	"golang.org/x/sys/unix"
)

// maxSocketPath is how long the path of a unix socket can be, bytes: sun_path
// of unix(7) less its final NUL.
const maxSocketPath = 107

// Identity is how a host proves itself to its peers and checks them.
type Identity struct {
	Server, Client *tls.Config
}

// LoadIdentity reads PEM files. The key pair is read again at each handshake,
// so that a renewed one is taken up without a restart. Without a CA the
// identity is good for a host without peers.
func LoadIdentity(ca, cert, key string) (Identity, error) {
	if ca == "" {
		return Identity{Client: &tls.Config{}}, nil
	}
	refuse := func(what string, err error) (Identity, error) {
		return Identity{}, fmt.Errorf("cannot read tls.%s: %w (put a PEM file there that belayd may read)", what, err)
	}
	pem, err := os.ReadFile(ca)
	if err != nil {
		return refuse("ca", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return refuse("ca", fmt.Errorf("%s has no certificate", ca))
	}
	pair := func() (*tls.Certificate, error) {
		c, err := tls.LoadX509KeyPair(cert, key)
		return &c, err
	}
	if _, err := pair(); err != nil {
		return refuse("cert "+cert+" and tls.key "+key, err)
	}
	return Identity{
		Server: &tls.Config{MinVersion: tls.VersionTLS13, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert,
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return pair() }},
		Client: &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: pool,
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return pair() }},
	}, nil
}

// Servers are HTTP servers with what they listen on. Listen and serve are two
// steps, so that every listener is open before anything is served.
type Servers struct {
	log *slog.Logger
	all []bound
}

type bound struct {
	server   *http.Server
	listener net.Listener
}

// NewServers returns an empty set.
func NewServers(log *slog.Logger) *Servers { return &Servers{log: log} }

func (s *Servers) add(l net.Listener, h http.Handler) *http.Server {
	server := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 30 * time.Second,
		IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug)}
	s.all = append(s.all, bound{server, l})
	return server
}

// ListenUnix opens the operators' socket, in place of one that a killed belayd
// left behind. Everybody may connect: what a caller may do is decided by its
// peer credentials.
func (s *Servers) ListenUnix(path string, a Agent, who Access) error {
	l, err := listenUnix(path)
	if err == nil {
		s.add(l, Handler(a, who.Unix, s.log)).ConnContext = connContext
	}
	return err
}

// ListenTLS opens the address (host:port) for peers and remote operators.
func (s *Servers) ListenTLS(address string, id Identity, a Agent, who Access) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return fmt.Errorf("cannot listen for peers on api.listen %s: %w", address, err)
	}
	s.add(tls.NewListener(l, id.Server), Handler(a, who.TLS, s.log))
	return nil
}

// ListenMetrics opens the address (host:port) for Prometheus.
func (s *Servers) ListenMetrics(address string, h http.Handler) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return fmt.Errorf("cannot listen for Prometheus on api.metrics %s: %w", address, err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", h)
	s.add(l, mux).WriteTimeout = writeTimeout
	return nil
}

// maxReaders is how many connections the status page has at a time: whoever is on this host
// may open them.
const maxReaders = 32

// ListenPage opens the address (host:port, on loopback) for browsers.
func (s *Servers) ListenPage(address string, h http.Handler) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return fmt.Errorf("cannot listen for browsers on page.listen %s: %w", address, err)
	}
	s.add(netutil.LimitListener(l, maxReaders), h).WriteTimeout = writeTimeout
	return nil
}

func listenUnix(path string) (net.Listener, error) {
	refuse := func(err error) error {
		return fmt.Errorf("cannot listen on api.socket %s: %w (make its folder writable for belayd)", path, err)
	}
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("cannot listen on api.socket %s: its path has %d bytes, unix sockets take %d (set a shorter api.socket)", path, len(path), maxSocketPath)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, refuse(err)
	}
	// Only a socket that nobody listens on is a killed belayd's, and only
	// that may be removed.
	if f, err := os.Lstat(path); err == nil && f.Mode().Type() != fs.ModeSocket {
		return nil, fmt.Errorf("cannot listen on api.socket %s: something that is not a socket is there (move it away, or set another api.socket)", path)
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	switch {
	case err == nil:
		c.Close()
		return nil, fmt.Errorf("cannot listen on api.socket %s: another belayd answers there (stop it, or set another api.socket)", path)
	case errors.Is(err, unix.ECONNREFUSED):
		if err := os.Remove(path); err != nil {
			return nil, refuse(err)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("cannot listen on api.socket %s: whether another belayd has it cannot be told: %w (stop it, or remove the socket)", path, err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, refuse(err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		l.Close()
		return nil, refuse(err)
	}
	return l, nil
}

// Serve serves every listener; a server that fails tells so.
func (s *Servers) Serve(failed chan<- error) {
	for _, b := range s.all {
		go func() {
			if err := b.server.Serve(b.listener); !errors.Is(err, http.ErrServerClosed) {
				failed <- fmt.Errorf("cannot serve %s: %w", b.listener.Addr(), err)
			}
		}()
	}
}

// Close lets requests in progress end within ctx, then cuts them.
func (s *Servers) Close(ctx context.Context) {
	for _, b := range s.all {
		if b.server.Shutdown(ctx) != nil {
			b.server.Close()
		}
		b.listener.Close() // one that was never served
	}
}
