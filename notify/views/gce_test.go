package views

import (
	"strings"
	"testing"
	"time"

	"belay/agent/maint"
)

const google = "Metadata-Flavor: Google"

func TestGCEMaintenanceEvent(t *testing.T) {
	for _, test := range []struct {
		events []maint.Impact
		want   string
	}{
		{nil, "NONE"},
		{[]maint.Impact{maint.ImpactFreeze}, "MIGRATE_ON_HOST_MAINTENANCE"},
		{[]maint.Impact{maint.ImpactReboot}, "TERMINATE_ON_HOST_MAINTENANCE"},
		{[]maint.Impact{maint.ImpactRedeploy, maint.ImpactFreeze}, "TERMINATE_ON_HOST_MAINTENANCE"},
		{[]maint.Impact{maint.ImpactFreeze, maint.ImpactTerminate}, "TERMINATE_ON_HOST_MAINTENANCE"},
		{[]maint.Impact{maint.ImpactPreempt}, "NONE"},
	} {
		w := newWorld()
		var events []maint.ScheduledEvent
		for _, i := range test.events {
			events = append(events, with(freeze(), i))
		}
		w.show(guestA, events...)
		r := ask(handler(t, w), "GET", "/computeMetadata/v1/instance/maintenance-event", "", google)
		want(t, r, 200, test.want)
		if r.Header.Get("Metadata-Flavor") != "Google" || r.Header.Get("ETag") == "" {
			t.Errorf("the headers are %v", r.Header)
		}
	}
}

func TestGCEUpcomingMaintenance(t *testing.T) {
	w := newWorld()
	h := handler(t, w)
	const path = "/computeMetadata/v1/instance/upcoming-maintenance"
	want(t, ask(h, "GET", path, "", google), 503, `{"error":"no notifications have been received yet, try again later"}`)

	later := freeze()
	later.NotBefore = later.NotBefore.Add(time.Hour)
	w.show(guestA, later, freeze())
	const lines = "can_reschedule true\nlatest_window_start_time 2026-11-22T12:00:00Z\nmaintenance_status PENDING\ntype SCHEDULED\n" +
		"window_end_time 2026-11-22T12:00:02Z\nwindow_start_time 2026-11-22T12:00:00Z\n"
	want(t, ask(h, "GET", path, "", google), 200, lines)
	want(t, ask(h, "GET", path+"?alt=json", "", google), 200,
		`{"canReschedule":"true","can_reschedule":"true","latestWindowStartTime":"2026-11-22T12:00:00Z","latest_window_start_time":"2026-11-22T12:00:00Z",`+
			`"maintenanceStatus":"PENDING","maintenance_status":"PENDING","type":"SCHEDULED","windowEndTime":"2026-11-22T12:00:02Z",`+
			`"windowStartTime":"2026-11-22T12:00:00Z","window_end_time":"2026-11-22T12:00:02Z","window_start_time":"2026-11-22T12:00:00Z"}`)

	now := started(freeze())
	now.NotBefore, now.Duration, now.Emergency = time.Time{}, maint.DurationUnknown, &maint.EventApproval{By: "root"}
	w.show(guestA, now)
	want(t, ask(h, "GET", path, "", google), 200,
		"can_reschedule false\nlatest_window_start_time 2026-11-22T12:01:00Z\nmaintenance_status ONGOING\ntype UNSCHEDULED\n"+
			"window_end_time 2026-11-22T13:01:00Z\nwindow_start_time 2026-11-22T12:01:00Z\n")
	w.show(guestA, with(freeze(), maint.ImpactPreempt))
	want(t, ask(h, "GET", path, "", google), 503, "*")
}

func TestGCETree(t *testing.T) {
	w := newWorld()
	h := handler(t, w)
	const all = `{"id":6097168012947869261,"maintenanceEvent":"NONE","name":"web-1","networkInterfaces":[{"ip":"10.0.0.1","mac":"52:54:00:aa:aa:aa"}],` +
		`"preempted":"FALSE","scheduling":{"automaticRestart":"TRUE","onHostMaintenance":"MIGRATE","preemptible":"FALSE"}}`
	for _, test := range []struct {
		target string
		status int
		body   string
	}{
		{"", 200, "instance/\n"},
		{"/", 200, "instance/\n"},
		{"/instance", 200, "*"},
		{"/instance/", 200, "id\nmaintenance-event\nname\nnetwork-interfaces/\npreempted\nscheduling/\n"},
		{"/instance/name", 200, "web-1"},
		{"/instance/name?alt=json", 200, `"web-1"`},
		{"/instance/preempted", 200, "FALSE"},
		{"/instance/scheduling/", 200, "automatic-restart\non-host-maintenance\npreemptible\n"},
		{"/instance/scheduling/on-host-maintenance", 200, "MIGRATE"},
		{"/instance/scheduling/?recursive=true&alt=text", 200, "automatic-restart TRUE\non-host-maintenance MIGRATE\npreemptible FALSE\n"},
		{"/instance/network-interfaces/0/mac", 200, "52:54:00:aa:aa:aa"},
		{"/instance/?recursive=true", 200, all},
		{"/?recursive=true&alt=json", 200, `{"instance":` + all + `}`},
		{"/instance/name/", 404, "*"},
		{"/instance/attributes/", 404, "*"},
		{"//instance/name", 404, "*"},
		{"/../v1/instance/name", 404, "*"},
		{"/instance/maintenance-event?wait_for_change=true&timeout_sec=x", 400, "*"},
		{"/instance/maintenance-event?wait_for_change=true&timeout_sec=-1", 400, "*"},
	} {
		t.Run(test.target, func(t *testing.T) {
			want(t, ask(h, "GET", "/computeMetadata/v1"+test.target, "", google), test.status, test.body)
		})
	}
	w.show(guestA, with(freeze(), maint.ImpactPreempt), freeze())
	want(t, ask(h, "GET", "/computeMetadata/v1/instance/preempted", "", google), 200, "TRUE")
	got := bodyOf(t, ask(h, "GET", "/computeMetadata/v1/?recursive=true", "", google))
	if !strings.Contains(got, `"upcomingMaintenance":{"canReschedule":"true",`) {
		t.Errorf("all of it is %s", got)
	}
	got = bodyOf(t, ask(h, "GET", "/computeMetadata/v1/?recursive=true&alt=text", "", google))
	if !strings.Contains(got, "instance/upcoming-maintenance/can_reschedule true\n") {
		t.Errorf("all of it is %s", got)
	}
}

func TestGCERules(t *testing.T) {
	h := handler(t, newWorld())
	const path = "/computeMetadata/v1/instance/name"
	r := ask(h, "GET", path, "")
	want(t, r, 403, "*")
	if r.Header.Get("Metadata-Flavor") != "Google" {
		t.Error("the flavour is not echoed")
	}
	want(t, ask(h, "GET", path, "", "Metadata-Flavor: Other"), 403, "*")
	want(t, ask(h, "GET", path, "", google, "X-Forwarded-For: 10.0.0.9"), 403, "*")
	want(t, ask(h, "POST", path, "", google), 405, "*")
	tag := ask(h, "GET", path, "", google).Header.Get("ETag")
	if strings.Contains(tag, `"`) {
		t.Errorf("the ETag %s has quotes", tag)
	}
	want(t, ask(h, "GET", path, "", google, "If-None-Match: "+tag), 304, "")
}
