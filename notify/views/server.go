package views

import (
	"log/slog"
	"net/http"
	"time"
)

// How long a guest may take to send a request, and to take in the answer.
const (
	requestTime = 10 * time.Second
	answerTime  = 10 * time.Second
)

// NewServer makes a server of a handler. Who serves adds ConnContext, which says
// with notify.WithGuest who is at the other end.
//
// A guest has 5 s for its headers, 10 s for all of a request, and 10 s for the
// answer. Shutdown ends its long polls.
func NewServer(h *Handler) *http.Server {
	s := &http.Server{
		Handler:                      h,
		ReadHeaderTimeout:            5 * time.Second,
		ReadTimeout:                  requestTime,
		WriteTimeout:                 requestTime + answerTime, // from the end of the headers
		IdleTimeout:                  2 * time.Minute,
		MaxHeaderBytes:               8 << 10,
		DisableGeneralOptionsHandler: true,
		// A slog.Handler escapes what guests have sent.
		ErrorLog: slog.NewLogLogger(h.log.Handler(), slog.LevelWarn),
	}
	s.RegisterOnShutdown(h.Stop)
	return s
}
