package views

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"strings"
	"time"

	"belay/notify"
)

const (
	// upstreamTimeout is how long another service has to begin its answer, and
	// upstreamBody what may be sent to it, bytes.
	upstreamTimeout = 8 * time.Second
	upstreamBody    = 64 << 10
	// The headers that tell it who asks. A guest's own are thrown away.
	upstreamUUID = "X-Belay-Guest-Uuid"
	upstreamName = "X-Belay-Guest-Name"
)

// claimed reports whether a path is about events: the rest is another service's,
// if there is one.
func claimed(path string) bool {
	if path == azureEventsPath || strings.HasPrefix(path, ownPath) {
		return true
	}
	if rest, is := strings.CutPrefix(path, gcePath+"/"); is {
		return slices.Contains([]string{"instance/maintenance-event", "instance/upcoming-maintenance", "instance/preempted"}, rest)
	}
	rest, is := strings.CutPrefix(path, "/"+ec2Version(path)+"/")
	return is && ec2Version(path) != "" && (rest == "api/token" || within(rest, "meta-data/events") || within(rest, "meta-data/spot"))
}

func within(path, folder string) bool { return path == folder || strings.HasPrefix(path, folder+"/") }

// newUpstream passes requests on to another metadata service, and says who asks.
func newUpstream(to *url.URL, source notify.Source, log *slog.Logger) http.Handler {
	return &httputil.ReverseProxy{
		Rewrite: func(p *httputil.ProxyRequest) {
			p.SetURL(to)
			p.SetXForwarded()
			p.Out.Host = p.In.Host
			guest, _ := notify.GuestOf(p.In.Context()) // or it would not have come so far
			p.Out.Header.Set(upstreamUUID, guest)
			p.Out.Header.Del(upstreamName)
			if i, known := source.Instance(guest); known {
				p.Out.Header.Set(upstreamName, url.PathEscape(i.Name))
			}
		},
		Transport: &http.Transport{ResponseHeaderTimeout: upstreamTimeout, MaxIdleConnsPerHost: 8, IdleConnTimeout: time.Minute},
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			var large *http.MaxBytesError
			switch {
			case errors.As(err, &large):
				refuse(http.StatusRequestEntityTooLarge, "the body is too large").write(w, r)
			case errors.Is(err, context.Canceled): // the guest has gone away
			default:
				log.Warn("the other metadata service does not answer", "url", to, "err", err)
				refuse(http.StatusBadGateway, "the metadata service does not answer").write(w, r)
			}
		},
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
}
