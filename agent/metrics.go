package agent

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"belay/agent/maint"
)

// metrics are what Prometheus sees of an agent. Counters count since the
// start; gauges are read from the snapshots when they are scraped.
type metrics struct {
	registry   *prometheus.Registry
	operations *prometheus.CounterVec
	downtime   prometheus.Histogram
	total      prometheus.Histogram
	pause      prometheus.Histogram
	fired      prometheus.Counter
	clocks     *prometheus.GaugeVec
}

func newMetrics(a *Agent) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		operations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "belay_operations_total", Help: "Operations that have ended, by kind and outcome."}, []string{"kind", "outcome"}),
		downtime: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "belay_migration_downtime_seconds", Help: "Blackout of finished migrations as QEMU measured it.",
			Buckets: []float64{.005, .01, .025, .05, .1, .2, .3, .5, 1, 2.5, 5, 10}}),
		total: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "belay_migration_duration_seconds", Help: "Time from request to verified of finished migrations.",
			Buckets: prometheus.ExponentialBuckets(1, 2, 12)}),
	}
	m.pause = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "belay_hold_pause_seconds", Help: "How long held guests stood still.",
		Buckets: []float64{.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}})
	m.fired = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "belay_leash_fired_total", Help: "Holds whose guests the leash had to release. Never good."})
	m.clocks = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "belay_guest_clock_offset_seconds",
		Help: "Guest's clock less the host's when it was last looked at, before and after it was put right.",
	}, []string{"guest", "when"})
	m.registry.MustRegister(m.operations, m.downtime, m.total, m.pause, m.fired, m.clocks, gauges{a})
	return m
}

func (m *metrics) ended(op maint.Op, o maint.Outcome) {
	m.operations.WithLabelValues(string(op.Kind), string(o)).Inc()
}

func (m *metrics) moved(r maint.MoveResult) {
	if r.Downtime > 0 { // else libvirt has not told
		m.downtime.Observe(r.Downtime.Seconds())
	}
	m.total.Observe(r.Total.Seconds())
}

func (m *metrics) held(r maint.HoldResult, leash []maint.LeashEvent) {
	for _, g := range r.Guests {
		if g.Pause > 0 {
			m.pause.Observe(g.Pause.Seconds())
		}
		if g.Clock != nil {
			m.clock(*g.Clock)
		}
	}
	for _, e := range leash {
		if e.Kind == maint.LeashFired {
			m.fired.Inc()
		}
	}
}

// clock keeps what was last found of a guest's clock; nothing, when nothing is
// known of it any more.
func (m *metrics) clock(r maint.ClockReport) {
	for when, offset := range map[string]*maint.ClockOffset{"before": r.Before, "after": r.After} {
		if offset == nil {
			m.clocks.DeleteLabelValues(r.Guest, when)
			continue
		}
		m.clocks.WithLabelValues(r.Guest, when).Set(offset.Offset.Seconds())
	}
}

// Metrics serves Prometheus.
func (a *Agent) Metrics() http.Handler {
	return promhttp.HandlerFor(a.metrics.registry, promhttp.HandlerOpts{})
}

// gauges reads the agent's snapshots.
type gauges struct{ a *Agent }

// Describe implements prometheus.Collector; describing nothing makes it an
// unchecked collector, whose metrics are all made in Collect.
func (g gauges) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (g gauges) Collect(ch chan<- prometheus.Metric) {
	gauge := func(name, help string, v float64, labels ...string) { // labels: name, value, …
		var names, values []string
		for i := 0; i < len(labels); i += 2 {
			names, values = append(names, labels[i]), append(values, labels[i+1])
		}
		ch <- prometheus.MustNewConstMetric(prometheus.NewDesc(name, help, names, nil), prometheus.GaugeValue, v, values...)
	}
	truth := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	a := g.a
	s, _ := a.Status(a.life) // from memory, cannot fail
	gauge("belay_build_info", "Always 1; the version is a label.", 1, "version", a.version)
	gauge("belay_libvirt_up", "Whether libvirt answers.", truth(a.view.last.Load().err == nil))
	gauge("belay_journal_writable", "Whether the last write to the journal worked.", truth(a.journal.Health() == nil))
	gauge("belay_operations_running", "Operations in progress.", float64(len(s.Operations)))
	gauge("belay_reservations", "Guests that room is kept for.", float64(len(s.Reservations)))
	gauge("belay_conditions", "What is wrong with this host now; see belay status.", float64(len(s.Conditions)))
	broken := 0
	for _, op := range s.Operations {
		if op.Trouble != nil && op.Trouble.Code == maint.CodePostCopy {
			broken++
		}
	}
	gauge("belay_postcopy_broken", "Guests in post-copy whose hosts have lost each other.", float64(broken))
	for state, n := range s.Guests {
		gauge("belay_guests", "Guests by state.", float64(n), "state", string(state))
	}
	for _, p := range s.Peers {
		gauge("belay_peer_up", "Whether a peer's belayd answers.", truth(p.OK), "peer", p.Name)
	}
}
