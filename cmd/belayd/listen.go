package main

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

	"belay/agent"
	"belay/agent/api"
	"belay/agent/config"
)

// identity is how this host proves itself to peers and checks them.
type identity struct {
	server, client *tls.Config
}

// loadIdentity reads the certificates. The key pair is read again at each
// handshake, so that a renewed one is taken up without a restart.
func loadIdentity(cfg config.Config) (identity, error) {
	if cfg.TLS.CA == "" {
		return identity{client: &tls.Config{}}, nil
	}
	refuse := func(what string, err error) (identity, error) {
		return identity{}, fmt.Errorf("cannot read tls.%s: %w (put a PEM file there that belayd may read)", what, err)
	}
	pem, err := os.ReadFile(cfg.TLS.CA)
	if err != nil {
		return refuse("ca", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return refuse("ca", fmt.Errorf("%s has no certificate", cfg.TLS.CA))
	}
	pair := func() (*tls.Certificate, error) {
		c, err := tls.LoadX509KeyPair(cfg.TLS.Cert, cfg.TLS.Key)
		return &c, err
	}
	if _, err := pair(); err != nil {
		return refuse("cert and tls.key", err)
	}
	return identity{
		server: &tls.Config{MinVersion: tls.VersionTLS13, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert,
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return pair() }},
		client: &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: pool,
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return pair() }},
	}, nil
}

// listeners are belayd's HTTP servers with what they listen on.
type listeners []struct {
	server   *http.Server
	listener net.Listener
}

// listen opens every listener before anything is served.
func listen(cfg config.Config, a *agent.Agent, id identity, log *slog.Logger) (all listeners, err error) {
	defer func() {
		if err != nil {
			for _, l := range all {
				l.listener.Close()
			}
			all = nil
		}
	}()
	access := api.Access{Operators: cfg.Access.Operators, Viewers: cfg.Access.Viewers,
		OperatorCerts: cfg.Access.OperatorCerts, ViewerCerts: cfg.Access.ViewerCerts}
	for _, p := range cfg.Peers {
		access.PeerCerts = append(access.PeerCerts, p.CertName)
	}
	add := func(l net.Listener, h http.Handler) *http.Server {
		s := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 30 * time.Second,
			IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10,
			ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug)}
		all = append(all, struct {
			server   *http.Server
			listener net.Listener
		}{s, l})
		return s
	}

	socket, err := listenUnix(cfg.API.Socket)
	if err != nil {
		return all, err
	}
	add(socket, api.Handler(a, access.Unix, log)).ConnContext = api.ConnContext
	if cfg.API.Listen != "" {
		l, err := net.Listen("tcp", cfg.API.Listen)
		if err != nil {
			return all, fmt.Errorf("cannot listen for peers on api.listen %s: %w", cfg.API.Listen, err)
		}
		add(tls.NewListener(l, id.server), api.Handler(a, access.TLS, log))
	}
	if cfg.API.Metrics != "" {
		l, err := net.Listen("tcp", cfg.API.Metrics)
		if err != nil {
			return all, fmt.Errorf("cannot listen for Prometheus on api.metrics %s: %w", cfg.API.Metrics, err)
		}
		mux := http.NewServeMux()
		mux.Handle("GET /metrics", a.Metrics())
		add(l, mux)
	}
	return all, nil
}

// listenUnix opens the operators' socket, in place of one that a killed belayd
// left behind. Everybody may connect: what a caller may do is decided by its
// peer credentials.
func listenUnix(path string) (net.Listener, error) {
	refuse := func(err error) error {
		return fmt.Errorf("cannot listen on api.socket %s: %w (make its folder writable for belayd)", path, err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, refuse(err)
	}
	if c, err := net.Dial("unix", path); err == nil {
		c.Close()
		return nil, fmt.Errorf("cannot listen on api.socket %s: another belayd answers there (stop it, or set another api.socket)", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, refuse(err)
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

func (ls listeners) serve(failed chan<- error) {
	for _, l := range ls {
		go func() {
			if err := l.server.Serve(l.listener); !errors.Is(err, http.ErrServerClosed) {
				failed <- fmt.Errorf("cannot serve %s: %w", l.listener.Addr(), err)
			}
		}()
	}
}

// stop lets requests in progress end for a moment, then cuts them.
func (ls listeners) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	for _, l := range ls {
		if l.server.Shutdown(ctx) != nil {
			l.server.Close()
		}
	}
}
