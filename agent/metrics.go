package agent

import (
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
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
	replaced   prometheus.Histogram
	kexeced    prometheus.Histogram
	fired      prometheus.Counter
	clocks     sync.Map // guest's name -> maint.ClockReport, as it was last looked at
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
	m.replaced = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "belay_replacement_pause_seconds", Help: "How long guests stood still at a time while they got a new QEMU.",
		Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30}})
	m.kexeced = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "belay_kexec_pause_seconds", Help: "How long guests stood still while the host's kernel was changed.",
		Buckets: []float64{1, 2.5, 5, 10, 20, 30, 45, 60, 90, 120, 180, 300, 600}})
	m.fired = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "belay_leash_fired_total", Help: "Holds whose guests the leash had to release. Never good."})
	m.registry.MustRegister(m.operations, m.downtime, m.total, m.pause, m.replaced, m.kexeced, m.fired, gauges{a},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	// All of them from the start: an increase is of what was there before it.
	for _, kind := range maint.OpKinds {
		for _, outcome := range maint.Outcomes {
			m.operations.WithLabelValues(string(kind), string(outcome))
		}
	}
	return m
}

// ended counts an operation as it has ended.
func (m *metrics) ended(op maint.Op) {
	m.operations.WithLabelValues(string(op.Kind), string(op.Outcome)).Inc()
	if r := op.Replaced; r != nil && r.Pause > 0 {
		m.replaced.Observe(r.Pause.Seconds())
	}
	if r := op.Kexeced; r != nil {
		for _, g := range r.Guests {
			if g.Pause > 0 {
				m.kexeced.Observe(g.Pause.Seconds())
			}
		}
	}
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

// clock keeps what was last found of a guest's clock.
func (m *metrics) clock(r maint.ClockReport) { m.clocks.Store(r.Guest, r) }

// Metrics serves Prometheus.
func (a *Agent) Metrics() http.Handler {
	return promhttp.HandlerFor(a.metrics.registry, promhttp.HandlerOpts{})
}

// timestamp is a moment in seconds since 1970.
func timestamp(t time.Time) float64 { return float64(t.UnixMilli()) / 1000 }

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
	conditions := make(map[maint.Code]int)
	for _, c := range s.Conditions {
		conditions[c.Code]++
	}
	for code, n := range conditions {
		gauge("belay_conditions", "What is wrong with this host now, by kind; see belay status.", float64(n), "code", string(code))
	}
	gauge("belay_cordoned", "Whether the host takes no guests in.", truth(s.Cordon != nil))
	oldest := make(map[maint.OpKind]time.Time)
	for _, op := range s.Operations {
		if at, known := oldest[op.Kind]; !known || op.Started.Before(at) {
			oldest[op.Kind] = op.Started
		}
	}
	for kind, at := range oldest {
		gauge("belay_operation_start_time_seconds", "When the oldest operation in progress began, by kind, in seconds since 1970.", timestamp(at), "kind", string(kind))
	}
	events := make(map[maint.EventState]int)
	for _, e := range a.keeper.Events(func(e maint.ScheduledEvent) bool { return !e.State.Over() }) {
		events[e.State]++
	}
	for _, state := range []maint.EventState{maint.EventScheduled, maint.EventStarted} {
		gauge("belay_scheduled_events", "Events that guests are told of, by state.", float64(events[state]), "state", string(state))
	}
	if a.cfg.TLS.Cert != "" {
		if cert, err := certificate(a.cfg.TLS.Cert); err == nil {
			gauge("belay_certificate_not_after_timestamp_seconds", "When this host's certificate expires, in seconds since 1970.", timestamp(cert.NotAfter))
		}
	}
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
	for _, g := range a.view.last.Load().guests { // one that has gone is another host's
		r, known := a.metrics.clocks.Load(g.Name)
		if !known {
			continue
		}
		report := r.(maint.ClockReport)
		for when, offset := range map[string]*maint.ClockOffset{"before": report.Before, "after": report.After} {
			if offset != nil {
				gauge("belay_guest_clock_offset_seconds", "Guest's clock less the host's when it was last looked at, before and after it was put right.",
					offset.Offset.Seconds(), "guest", g.Name, "when", when)
			}
		}
	}
	for _, p := range s.Peers {
		gauge("belay_peer_up", "Whether a peer's belayd answers.", truth(p.OK), "peer", p.Name)
	}
}
