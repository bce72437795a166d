package page

import (
	"net"
	"net/http"
	"net/netip"
	"strconv"
)

// guard keeps what is served from whom it is not for:
//   - Only loopback's own names are answered for. A page of another site, which has its own
//     name lead to this host (DNS rebinding), is told nothing: its name is not among them.
//   - Nothing but GET and HEAD, so that nothing can be changed.
//   - The browser is told to run no script, to load and to be framed by nothing else, and to
//     keep nothing.
func guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		for name, value := range map[string]string{
			"Content-Security-Policy":      "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
			"Cross-Origin-Opener-Policy":   "same-origin",
			"Cross-Origin-Resource-Policy": "same-origin",
			"X-Content-Type-Options":       "nosniff",
			"X-Frame-Options":              "DENY",
			"Referrer-Policy":              "no-referrer",
			"Cache-Control":                "no-store",
		} {
			h.Set(name, value)
		}
		switch {
		case !loopback(r.Host):
			http.Error(w, "this page is served to its own host only: ask for it as 127.0.0.1 or localhost", http.StatusMisdirectedRequest)
		case r.Method != http.MethodGet && r.Method != http.MethodHead:
			h.Set("Allow", "GET, HEAD")
			http.Error(w, "this page only shows", http.StatusMethodNotAllowed)
		default:
			next.ServeHTTP(w, r)
		}
	})
}

// loopback reports whether a Host header names this host to itself, by any port: one that is
// forwarded (ssh -L) can be another.
func loopback(host string) bool {
	name, port, err := net.SplitHostPort(host)
	if err != nil {
		name = host // without a port
	} else if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return false
	}
	if name == "localhost" {
		return true
	}
	if len(name) > 2 && name[0] == '[' && name[len(name)-1] == ']' {
		name = name[1 : len(name)-1]
	}
	address, err := netip.ParseAddr(name)
	return err == nil && address.IsLoopback()
}
