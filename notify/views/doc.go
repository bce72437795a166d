// Package views answers guests over HTTP, in the forms of three clouds and one of
// our own. All show the same events:
//
//	azure     /metadata/scheduledevents, /metadata/instance
//	gce       /computeMetadata/v1/...
//	ec2       /latest/..., and a date for latest
//	own       /belay/v1/...
//
// New makes the handler of all, NewServer a server for it. Who asks is what
// notify.WithGuest has put into the request's context, and nothing that the
// request says; whoever is no guest gets 404 for everything.
//
// A request is refused with 403 if its Host is not a name of a metadata service, so
// that no web page gets an answer by DNS rebinding, and with 429 and Retry-After,
// 100 ms late, if the guest asks too often (Limits). Paths are compared as they were
// sent, and there are no redirects. A query parameter that is given twice is refused
// with 400.
//
// # Another metadata service
//
// Where there is one (Config.Upstream), only the paths of events are answered here,
// and EC2's tokens; all else is passed on to it, with who asks.
//
// # Long polls
//
// Every document of events can be waited for. In GCE's form that is its
// wait_for_change, last_etag and timeout_sec. In all forms it is
//
//	?wait=DURATION[&incarnation=N]
//
// such as wait=30s: the answer comes when it is another than that of incarnation N
// (Azure's form and our own), else than the ETag in If-None-Match, else than it is
// now; after the wait (5 minutes at most, Limits.Wait) what is there is answered:
// 304 if If-None-Match names it. An answer with "Connection: close" before that says that the guest is
// about to move: connect again, and go on.
//
// # Our own form
//
// All requests have the header "Metadata: true". Bodies are JSON objects of at most
// 16 KiB, times are RFC 3339, durations in bodies such as "30s". What changes
// something answers 204. Errors are {"code","subject","reason","remedy"}: 400 for
// what cannot be read, 404 for what is not there, 409 for what cannot be done now.
//
//	GET  /belay/v1/events                what will happen and is happening: Document;
//	                                     can be waited for
//	GET  /belay/v1/history               what is over, the latest first: []Event
//	POST /belay/v1/approve               {"event":ID} have it start as soon as it can
//	POST /belay/v1/listeners/register    {"name":NAME,"timeout":DURATION} have events
//	                                     wait for a program, from the next one on
//	POST /belay/v1/listeners/unregister  {"name":NAME} and no longer
//	POST /belay/v1/listeners/ready       {"name":NAME,"event":ID} it is ready
//	GET  /belay/v1/maintenance           campaigns: []Maintenance
//	POST /belay/v1/maintenance/book      {"campaign":ID,"at":TIME} pick the moment
//	POST /belay/v1/maintenance/start     {"campaign":ID} have it done now
//	POST /belay/v1/maintenance/defer     {"campaign":ID} take a booked moment back
//
// # How impacts are shown
//
//	          Azure       GCE                             EC2
//	Freeze    Freeze      MIGRATE_ON_HOST_MAINTENANCE     system-maintenance, if configured
//	Reboot    Reboot      TERMINATE_ON_HOST_MAINTENANCE   system-reboot
//	Redeploy  Redeploy    TERMINATE_ON_HOST_MAINTENANCE   instance-stop
//	Preempt   Preempt     preempted: TRUE                 spot/instance-action
//	Terminate Terminate   TERMINATE_ON_HOST_MAINTENANCE   instance-retirement
//
// An Azure client that asks for a version older than an impact is not shown it.
// Azure shows a machine also the events of others in its availability set. Here
// a guest is shown its own only: of Pacemaker's two agents, azure-events relies on
// the others' and brings a node back too early, azure-events-az does not.
// EC2 and GCE must have an end: where the duration is not known, an hour is
// assumed.
//
// # Moves
//
// Connections do not follow a guest to another host. Drain ends those of a guest
// before it is switched over.
package views
