// Package prometheus_test holds what is shipped for Prometheus and Grafana against what
// belayd has: no rule, panel or document names a metric that is not there.
package prometheus_test

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"go.yaml.in/yaml/v3"

	"belay/agent/agenttest"
	"belay/agent/config"
	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
)

const (
	rulesFile     = "belay-rules.yml"
	rulesTests    = "belay-rules.test.yml"
	dashboardFile = "../grafana/belay.json"
	runbooks      = "../../docs/runbooks.md"
	document      = "../../docs/monitoring.md"
)

// scraped is what a belayd answers that has something of everything.
func scraped(t *testing.T) string {
	t.Helper()
	w := agenttest.New(t, slog.New(slog.DiscardHandler), func(c *config.Config) {
		c.Events = config.Events{Enabled: true, Policy: "all"}
	}, "a", "b")
	n := w.Nodes[0]
	n.Host.PutGuest("web-1")
	n.Host.PutGuest("web-2")
	hold, err := n.Client.Hold(t.Context(), maint.HoldRequest{All: true, Step: maint.HostStep{Command: []string{"true"}}, Emergency: "a test"})
	must(t, err)
	_, err = n.Client.Watch(t.Context(), hold.ID, func(maint.Op) {})
	must(t, err)
	copying := make(chan struct{}, 1)
	w.OnPhase(func(_ string, ph hypervisortest.Phase) {
		if ph == hypervisortest.PhaseCopying {
			copying <- struct{}{}
		}
	})
	n.Host.HoldCopies()
	_, err = n.Client.Migrate(t.Context(), maint.MigrateRequest{Guest: "web-1", To: "b", Emergency: "a test"})
	must(t, err)
	<-copying
	scrape := func(wants ...string) string {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); ; {
			answer := httptest.NewRecorder()
			n.Agent.Metrics().ServeHTTP(answer, httptest.NewRequest("GET", "/metrics", nil))
			body := answer.Body.String()
			if answer.Code == 200 && !slices.ContainsFunc(wants, func(want string) bool { return !strings.Contains(body, "\n"+want) }) {
				return body
			}
			if time.Now().After(deadline) {
				t.Fatalf("%d: %v are not in\n%s", answer.Code, wants, body)
			}
			time.Sleep(10 * time.Millisecond) // a scrape is a question: there is nothing to await
		}
	}
	scrape(`belay_guests{state="running"} 2`, "belay_peer_up{")
	n.Host.KillLibvirt()
	return scrape(`belay_conditions{code="libvirt-unreachable"}`, "belay_operation_start_time_seconds{", "belay_guest_clock_offset_seconds{")
}

// once has what was scraped, for all tests.
var once struct {
	sync.Mutex
	text     string
	families map[string]*dto.MetricFamily
}

// families are belayd's metrics by name.
func families(t *testing.T) map[string]*dto.MetricFamily {
	t.Helper()
	_ = text(t)
	return once.families
}

func text(t *testing.T) string {
	t.Helper()
	once.Lock()
	defer once.Unlock()
	if once.text == "" {
		once.text = scraped(t)
		parser := expfmt.NewTextParser(model.UTF8Validation)
		var err error
		once.families, err = parser.TextToMetricFamilies(strings.NewReader(once.text))
		must(t, err)
	}
	return once.text
}

// TestNamesAreTheFields: Prometheus' own linter has nothing against a name, unit or help.
func TestNamesAreTheFields(t *testing.T) {
	t.Parallel()
	problems, err := promlint.New(strings.NewReader(text(t))).Lint()
	must(t, err)
	for _, p := range problems {
		if strings.HasPrefix(p.Metric, "belay_") {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
}

// TestCountersAreThereFromTheStart: the first operation that is stuck is an increase.
func TestCountersAreThereFromTheStart(t *testing.T) {
	t.Parallel()
	body := text(t)
	for _, kind := range maint.OpKinds {
		for _, outcome := range maint.Outcomes {
			if want := fmt.Sprintf("\nbelay_operations_total{kind=%q,outcome=%q} ", kind, outcome); !strings.Contains(body, want) {
				t.Errorf("no %s", want)
			}
		}
	}
	for _, want := range []string{"belay_leash_fired_total 0", "belay_hold_pause_seconds_count 2", `belay_guest_clock_offset_seconds{guest="web-1",when="before"} -1`,
		`belay_scheduled_events{state="started"} 1`, `belay_operations_total{kind="hold",outcome="done"} 1`} {
		if !strings.Contains(body, "\n"+want+"\n") {
			t.Errorf("no %s in\n%s", want, body)
		}
	}
}

// TestDocumented: each metric is in the document, with its labels, and nothing else is.
func TestDocumented(t *testing.T) {
	t.Parallel()
	told := make(map[string]string)
	for _, m := range regexp.MustCompile("(?m)^\\| `(belay_[a-z_]+)(?:\\{([a-z,]+)\\})?` \\| (gauge|counter|histogram) \\|").FindAllStringSubmatch(read(t, document), -1) {
		told[m[1]] = m[3] + " " + m[2]
	}
	has := make(map[string]string)
	for name, f := range families(t) {
		if strings.HasPrefix(name, "belay_") {
			has[name] = strings.ToLower(f.GetType().String()) + " " + strings.Join(labels(f), ",")
		}
	}
	for name, what := range has {
		if told[name] != what {
			t.Errorf("%s is %q, and %s says %q", name, what, document, told[name])
		}
	}
	for name := range told {
		if has[name] == "" {
			t.Errorf("%s has %s, and belayd does not", document, name)
		}
	}
}

// labels are those of a family, in order.
func labels(f *dto.MetricFamily) (names []string) {
	for _, m := range f.Metric {
		for _, l := range m.Label {
			if !slices.Contains(names, l.GetName()) {
				names = append(names, l.GetName())
			}
		}
	}
	slices.Sort(names)
	return names
}

// ruleFile is a file of Prometheus' rules, as far as it is looked at.
type ruleFile struct {
	Groups []struct {
		Rules []rule `yaml:"rules"`
	} `yaml:"groups"`
}

type rule struct {
	Alert       string            `yaml:"alert"`
	Expr        string            `yaml:"expr"`
	Labels      map[string]string `yaml:"labels"`
	Annotations map[string]string `yaml:"annotations"`
}

func rules(t *testing.T) (all []rule) {
	t.Helper()
	var f ruleFile
	must(t, yaml.Unmarshal([]byte(read(t, rulesFile)), &f))
	for _, g := range f.Groups {
		all = append(all, g.Rules...)
	}
	if len(all) < 10 {
		t.Fatalf("there are %d rules", len(all))
	}
	return all
}

// TestAlertsHaveRunbooks, and there is no runbook for an alert that does not exist.
func TestAlertsHaveRunbooks(t *testing.T) {
	t.Parallel()
	_, section, found := strings.Cut(read(t, runbooks), "\n## Alerts\n")
	if !found {
		t.Fatalf("%s has no section for alerts", runbooks)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	var headings []string
	for _, m := range regexp.MustCompile(`(?m)^### (\w+)$`).FindAllStringSubmatch(section, -1) {
		headings = append(headings, m[1])
	}
	for _, r := range rules(t) {
		if !slices.Contains(headings, r.Alert) {
			t.Errorf("%s has no runbook", r.Alert)
		}
		headings = slices.DeleteFunc(headings, func(h string) bool { return h == r.Alert })
		// Where dist/package puts the document, and GitHub's anchor of the heading.
		if want := "file:///usr/share/doc/belay/docs/runbooks.md#" + strings.ToLower(r.Alert); r.Annotations["runbook_url"] != want {
			t.Errorf("%s: runbook_url is %q, want %q", r.Alert, r.Annotations["runbook_url"], want)
		}
		if r.Annotations["summary"] == "" || r.Annotations["description"] == "" {
			t.Errorf("%s does not say what it is about", r.Alert)
		}
		if !slices.Contains([]string{"critical", "warning", "info"}, r.Labels["severity"]) {
			t.Errorf("%s: severity is %q", r.Alert, r.Labels["severity"])
		}
	}
	if len(headings) > 0 {
		t.Errorf("runbooks for alerts that do not exist: %v", headings)
	}
}

// names finds metrics in a query, with the labels that are asked of each.
var names = regexp.MustCompile(`\b((?:belay|process|go)_[a-z_]+)(?:\{([^}]*)\})?`)

// asked checks that what a query names is there.
func asked(t *testing.T, where, query string) {
	t.Helper()
	has := families(t)
	if !strings.Contains(query, "up{") && !names.MatchString(query) {
		t.Errorf("%s asks for nothing of Belay's: %s", where, query)
	}
	for _, m := range names.FindAllStringSubmatch(query, -1) {
		name := m[1]
		f := has[name]
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			if base, is := strings.CutSuffix(name, suffix); is && has[base].GetType() == dto.MetricType_HISTOGRAM {
				f = has[base]
			}
		}
		if f == nil {
			t.Errorf("%s asks for %s, which belayd does not have", where, name)
			continue
		}
		may := append(labels(f), "instance", "job", "le")
		for _, l := range regexp.MustCompile(`(\w+)\s*(?:=~|!~|!=|=)`).FindAllStringSubmatch(m[2], -1) {
			if !slices.Contains(may, l[1]) {
				t.Errorf("%s asks for the label %s of %s, which has %v", where, l[1], name, may)
			}
		}
	}
}

func TestRulesAskForWhatThereIs(t *testing.T) {
	t.Parallel()
	for _, r := range rules(t) {
		asked(t, r.Alert, r.Expr)
	}
}

// dashboard is Grafana's, as far as it is looked at.
type dashboard struct {
	UID    string `json:"uid"`
	Title  string `json:"title"`
	Panels []struct {
		ID      int    `json:"id"`
		Type    string `json:"type"`
		Title   string `json:"title"`
		GridPos struct{ X, Y, W, H int }
		Targets []struct {
			Expr string `json:"expr"`
		} `json:"targets"`
	} `json:"panels"`
	Templating struct {
		List []struct {
			Name       string `json:"name"`
			Definition string `json:"definition"`
		} `json:"list"`
	} `json:"templating"`
}

func panels(t *testing.T) (d dashboard, queries map[string][]string) {
	t.Helper()
	must(t, json.Unmarshal([]byte(read(t, dashboardFile)), &d))
	queries = make(map[string][]string)
	for _, p := range d.Panels {
		for _, target := range p.Targets {
			queries[p.Title] = append(queries[p.Title], target.Expr)
		}
	}
	return d, queries
}

func TestDashboard(t *testing.T) {
	t.Parallel()
	d, queries := panels(t)
	ids := make(map[int]bool)
	for i, p := range d.Panels {
		if ids[p.ID] || p.ID == 0 || p.Title == "" || p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("panel %d (%s) has an ID twice, no title, or nothing to show", p.ID, p.Title)
		}
		ids[p.ID] = true
		for _, q := range d.Panels[:i] {
			a, b := p.GridPos, q.GridPos
			if a.X < b.X+b.W && b.X < a.X+a.W && a.Y < b.Y+b.H && b.Y < a.Y+a.H || a.X+a.W > 24 {
				t.Errorf("panels %s and %s overlap", p.Title, q.Title)
			}
		}
	}
	for title, all := range queries {
		for _, q := range all {
			asked(t, "panel "+title, q)
		}
	}
	for _, v := range d.Templating.List {
		if v.Definition != "" {
			asked(t, "variable "+v.Name, v.Definition)
		}
	}
	// Each of belayd's metrics is shown somewhere.
	shown := fmt.Sprint(queries)
	for name := range families(t) {
		if strings.HasPrefix(name, "belay_") && !strings.Contains(shown, name) {
			t.Errorf("%s is in no panel", name)
		}
	}
}

// TestPromtool has Prometheus itself read the rules and the panels' queries, and run the
// rules on series that were made for them.
func TestPromtool(t *testing.T) {
	t.Parallel()
	promtool := os.Getenv("BELAY_PROMTOOL")
	if promtool == "" {
		promtool = "promtool"
		if _, err := exec.LookPath(promtool); err != nil {
			t.Skip("promtool is not installed; make test-unit installs it")
		}
	}
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.CommandContext(t.Context(), promtool, args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %v: %v\n%s", args, err, out)
		}
	}
	run("check", "rules", rulesFile)
	run("test", "rules", rulesTests)

	type recorded struct {
		Record string `yaml:"record"`
		Expr   string `yaml:"expr"`
	}
	var all []recorded
	_, queries := panels(t)
	variables := strings.NewReplacer("$__rate_interval", "5m", "$__range", "6h", "$instance", ".*")
	for _, exprs := range queries {
		for _, e := range exprs {
			all = append(all, recorded{fmt.Sprintf("panel:%d", len(all)), variables.Replace(e)})
		}
	}
	type group struct {
		Name  string     `yaml:"name"`
		Rules []recorded `yaml:"rules"`
	}
	b, err := yaml.Marshal(map[string][]group{"groups": {{"panels", all}}})
	must(t, err)
	file := filepath.Join(t.TempDir(), "panels.yml")
	must(t, os.WriteFile(file, b, 0o600))
	run("check", "rules", file)
}

// TestEveryAlertIsTried: when it fires, and when it does not.
func TestEveryAlertIsTried(t *testing.T) {
	t.Parallel()
	var tests struct {
		Tests []struct {
			Alerts []struct {
				Name string `yaml:"alertname"`
				Exp  []any  `yaml:"exp_alerts"`
			} `yaml:"alert_rule_test"`
		} `yaml:"tests"`
	}
	must(t, yaml.Unmarshal([]byte(read(t, rulesTests)), &tests))
	fires, silent := make(map[string]bool), make(map[string]bool)
	for _, c := range tests.Tests {
		for _, a := range c.Alerts {
			fires[a.Name] = fires[a.Name] || len(a.Exp) > 0
			silent[a.Name] = silent[a.Name] || len(a.Exp) == 0
		}
	}
	for _, r := range rules(t) {
		if !fires[r.Alert] || !silent[r.Alert] {
			t.Errorf("%s is tried where it fires: %v, and where it does not: %v", r.Alert, fires[r.Alert], silent[r.Alert])
		}
	}
}

func read(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	must(t, err)
	return string(b)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
