package views

import (
	"fmt"
	"hash/fnv"
	"net/http"
	"strconv"
	"strings"
	"time"

	"belay/agent/maint"
	"belay/notify"
)

const (
	gcePath     = "/computeMetadata/v1"
	gceUpcoming = "instance/upcoming-maintenance"
)

// gce is a part of GCE's metadata server (Google Cloud, "Query metadata server
// for maintenance event notices" and "View and query VM metadata").
func gce(c *call, path string) answer {
	c.w.Header().Set("Metadata-Flavor", "Google")
	if c.r.Header.Get("Metadata-Flavor") != "Google" {
		return refuse(http.StatusForbidden, "the required header is missing: send Metadata-Flavor: Google")
	}
	if forwarded(c.r) {
		return refuse(http.StatusForbidden, noForwarding)
	}
	if c.r.Method != http.MethodGet {
		return wrongMethod("GET")
	}
	known, wait, err := c.waitForChange()
	if err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	path = strings.TrimPrefix(strings.TrimPrefix(path, gcePath), "/")
	return c.document(known, wait, func(doc notify.Document) answer {
		i, there := c.source.Instance(c.guest)
		if !there {
			return refuse(http.StatusNotFound, "not found")
		}
		return gceAnswer(c, gceTree(doc, c.guest, i), path)
	})
}

// waitForChange is what GCE's parameters say, or ours.
func (c *call) waitForChange() (known string, wait time.Duration, err error) {
	if !c.query.is("wait_for_change") {
		return c.longPoll()
	}
	wait = c.limits.Wait
	if v, there := c.query.get("timeout_sec"); there {
		s, err := strconv.ParseUint(v, 10, 31)
		if err != nil {
			return "", 0, fmt.Errorf("timeout_sec=%q is not a number of seconds: give one such as 60", v)
		}
		wait = time.Duration(s) * time.Second
	}
	known, _ = c.query.get("last_etag")
	return known, wait, nil
}

func gceAnswer(c *call, t tree, path string) (a answer) {
	alt, _ := c.query.get("alt")
	switch v, isLeaf := t.leaf(path); {
	case isLeaf && alt == "json":
		a = object(http.StatusOK, gceBoth(v))
	case isLeaf:
		a = text(gceText(v))
	case path == gceUpcoming: // the form in which GCE says that there is none
		a = object(http.StatusServiceUnavailable, map[string]string{"error": "no notifications have been received yet, try again later"})
	case t.list(folder(path)) == nil:
		return refuse(http.StatusNotFound, "not found")
	case c.query.is("recursive") && alt == "text":
		a = text(gceLines(t, folder(path)))
	case c.query.is("recursive"), alt == "json":
		a = object(http.StatusOK, gceObject(t, folder(path)))
	default:
		a = text(strings.Join(t.list(folder(path)), "\n") + "\n")
	}
	a = a.tag()
	a.etag = strings.Trim(a.etag, `"`) // GCE's have no quotes
	return a
}

// gceFields are values in the order of their names.
type gceFields []struct{ name, value string }

func gceTree(doc notify.Document, guest string, i notify.Instance) (t tree) {
	id := fnv.New64a()
	id.Write([]byte(guest))
	t.add("instance/id", func() any { return id.Sum64() >> 1 }) // fits a signed number
	t.text("instance/maintenance-event", gceMaintenanceEvent(doc, guest))
	t.text("instance/name", i.Name)
	for n, nic := range i.Interfaces {
		at := fmt.Sprintf("instance/network-interfaces/%d/", n)
		if ip, there := firstIPv4(nic); there {
			t.text(at+"ip", ip)
		}
		t.text(at+"mac", nic.MAC)
	}
	preempted := "FALSE"
	for e := range visible(doc, guest) {
		if e.Impact == maint.ImpactPreempt {
			preempted = "TRUE"
		}
	}
	t.text("instance/preempted", preempted)
	// What a host does with its guests: it moves or holds them, and boots anew
	// those that it cannot spare a boot.
	t.text("instance/scheduling/automatic-restart", "TRUE")
	t.text("instance/scheduling/on-host-maintenance", "MIGRATE")
	t.text("instance/scheduling/preemptible", "FALSE")
	if fields := gceUpcomingMaintenance(doc, guest); fields != nil {
		t.add(gceUpcoming, func() any { return fields })
	}
	return t
}

func firstIPv4(nic notify.Interface) (ip string, there bool) {
	for _, a := range nic.Addrs {
		if a.Is4() {
			return a.String(), true
		}
	}
	return "", false
}

// gceMaintenanceEvent is the worst that is announced or going on. GCE gives
// notice a minute before the start; here it is there from the announcement on.
func gceMaintenanceEvent(doc notify.Document, guest string) string {
	word := "NONE"
	for e := range visible(doc, guest) {
		switch e.Impact {
		case maint.ImpactPreempt: // has a key of its own
		case maint.ImpactFreeze:
			if word == "NONE" {
				word = "MIGRATE_ON_HOST_MAINTENANCE"
			}
		default:
			word = "TERMINATE_ON_HOST_MAINTENANCE"
		}
	}
	return word
}

// gceUpcomingMaintenance is the maintenance that starts first; nil: there is none.
func gceUpcomingMaintenance(doc notify.Document, guest string) gceFields {
	var first *maint.ScheduledEvent
	for e := range visible(doc, guest) {
		if e.Impact != maint.ImpactPreempt && (first == nil || begins(e).Before(begins(first))) {
			first = e
		}
	}
	if first == nil {
		return nil
	}
	status, kind := "PENDING", "SCHEDULED"
	if first.State == maint.EventStarted {
		status = "ONGOING"
	}
	if first.Emergency != nil {
		kind = "UNSCHEDULED"
	}
	start := begins(first).UTC().Format(time.RFC3339)
	return gceFields{
		{"can_reschedule", strconv.FormatBool(first.State == maint.EventScheduled && first.Approval == nil)},
		{"latest_window_start_time", start},
		{"maintenance_status", status},
		{"type", kind},
		{"window_end_time", ends(first).UTC().Format(time.RFC3339)},
		{"window_start_time", start},
	}
}

func gceText(v any) string {
	fields, many := v.(gceFields)
	if !many {
		return fmt.Sprint(v)
	}
	var b strings.Builder
	for _, f := range fields {
		fmt.Fprintf(&b, "%s %s\n", f.name, f.value)
	}
	return b.String()
}

// gceLines are all values below a folder, one a line.
func gceLines(t tree, folder string) string {
	var b strings.Builder
	for _, l := range t {
		rest, within := strings.CutPrefix(l.path, folder)
		if !within {
			continue
		}
		v := l.value()
		if fields, many := v.(gceFields); many {
			for _, f := range fields {
				fmt.Fprintf(&b, "%s/%s %s\n", rest, f.name, f.value)
			}
			continue
		}
		fmt.Fprintf(&b, "%s %v\n", rest, v)
	}
	return b.String()
}

// gceBoth is a value as JSON with the names in both forms: some clients read
// can_reschedule, some canReschedule.
func gceBoth(v any) any {
	fields, many := v.(gceFields)
	if !many {
		return v
	}
	m := make(map[string]string, 2*len(fields))
	for _, f := range fields {
		m[f.name], m[camel(f.name)] = f.value, f.value
	}
	return m
}

// gceObject is all that is below a folder as JSON.
func gceObject(t tree, folder string) any {
	names := t.list(folder)
	if first := names[0][0]; '0' <= first && first <= '9' {
		var all []any
		for _, name := range names {
			all = append(all, gceObject(t, folder+name))
		}
		return all
	}
	m := make(map[string]any, len(names))
	for _, name := range names {
		if sub, isFolder := strings.CutSuffix(name, "/"); isFolder {
			m[camel(sub)] = gceObject(t, folder+name)
			continue
		}
		v, _ := t.leaf(folder + name)
		if fields, many := v.(gceFields); many {
			sub := make(map[string]string, len(fields))
			for _, f := range fields {
				sub[camel(f.name)] = f.value
			}
			v = sub
		}
		m[camel(name)] = v
	}
	return m
}

// camel turns "maintenance-event" or "window_start_time" into camel case.
func camel(s string) string {
	var b strings.Builder
	for i, part := range strings.FieldsFunc(s, func(r rune) bool { return r == '-' || r == '_' }) {
		if i > 0 {
			part = strings.ToUpper(part[:1]) + part[1:]
		}
		b.WriteString(part)
	}
	return b.String()
}
