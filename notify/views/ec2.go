package views

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"net/http"
	"strconv"
	"strings"
	"time"

	"belay/agent/maint"
	"belay/notify"
)

const (
	ec2TokenHeader = "X-Aws-Ec2-Metadata-Token"
	ec2TTLHeader   = "X-Aws-Ec2-Metadata-Token-Ttl-Seconds"
	ec2Date        = "2 Jan 2006 15:04:05 GMT"
	ec2MaxTTL      = 6 * time.Hour
)

// ec2 is a part of EC2's instance metadata (Amazon EC2 User Guide, "Instance
// metadata categories" and "Scheduled events for Amazon EC2 instances").
func ec2(c *call, path string) answer {
	if forwarded(c.r) {
		return refuse(http.StatusForbidden, noForwarding)
	}
	path = strings.TrimPrefix(strings.TrimPrefix(path, "/"+ec2Version(path)), "/")
	if path == "api/token" {
		return ec2Token(c)
	}
	if c.r.Method != http.MethodGet {
		return wrongMethod("GET")
	}
	if token := c.r.Header.Get(ec2TokenHeader); (token != "" || !c.ec2.IMDSv1) && !c.validToken(token) {
		return refuse(http.StatusUnauthorized, "a valid token is required: get one with PUT /latest/api/token")
	}
	known, wait, err := c.longPoll()
	if err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	return c.document(known, wait, func(doc notify.Document) answer {
		i, there := c.source.Instance(c.guest)
		if !there {
			return refuse(http.StatusNotFound, "not found")
		}
		t := ec2Tree(c, doc, i)
		if v, isLeaf := t.leaf(path); isLeaf {
			return text(v.(string)).tag()
		}
		if names := t.list(folder(path)); names != nil {
			return text(strings.Join(names, "\n")).tag()
		}
		return refuse(http.StatusNotFound, "not found")
	})
}

// ec2Version is the version that a path in EC2's form begins with: "latest", or a
// date; "" where it is none. All have the same content. cloud-init asks for dates
// only.
func ec2Version(path string) string {
	version, _, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	if _, err := time.Parse(time.DateOnly, version); err != nil && version != "latest" {
		return ""
	}
	return version
}

// ec2Tree lists only what exists: cloud-init asks for all that is listed, and
// gives up when one is missing.
func ec2Tree(c *call, doc notify.Document, i notify.Instance) (t tree) {
	const meta = "meta-data/"
	t.add(meta+"events/maintenance/history", func() any { return ec2History(c) })
	t.add(meta+"events/maintenance/scheduled", func() any { return ec2Scheduled(c, doc) })
	t.text(meta+"instance-id", i.UUID)
	t.text(meta+"local-hostname", i.Name)
	if len(i.Interfaces) > 0 {
		if ip, there := firstIPv4(i.Interfaces[0]); there {
			t.text(meta+"local-ipv4", ip)
		}
		t.text(meta+"mac", i.Interfaces[0].MAC)
	}
	for e := range visible(doc, c.guest) {
		if e.Impact == maint.ImpactPreempt {
			at := begins(e).UTC().Format(time.RFC3339)
			t.text(meta+"spot/instance-action", `{"action":"terminate","time":"`+at+`"}`)
			t.text(meta+"spot/termination-time", at)
			break
		}
	}
	return t
}

type ec2Event struct {
	NotBefore, NotAfter, Code, Description string
	EventID                                string `json:"EventId"`
	State                                  string
}

func ec2Scheduled(c *call, doc notify.Document) string {
	events := []ec2Event{}
	for e := range visible(doc, c.guest) {
		if code := ec2Code(e.Impact, c.ec2); code != "" {
			events = append(events, ec2EventOf(e, code, "active", ""))
		}
	}
	return string(encode(events))
}

func ec2History(c *call) string {
	events := []ec2Event{}
	past := c.source.History(c.guest)
	for i := range past {
		e := &past[i]
		code := ec2Code(e.Impact, c.ec2)
		switch {
		case code == "" || !concerns(e, c.guest):
		case e.State == maint.EventCompleted:
			events = append(events, ec2EventOf(e, code, "completed", "[Completed] "))
		case e.State == maint.EventCancelled:
			events = append(events, ec2EventOf(e, code, "canceled", "[Canceled] "))
		}
	}
	return string(encode(events))
}

func ec2EventOf(e *maint.ScheduledEvent, code, state, mark string) ec2Event {
	return ec2Event{
		NotBefore: begins(e).UTC().Format(ec2Date), NotAfter: ends(e).UTC().Format(ec2Date),
		Code: code, Description: mark + e.Description, EventID: string(e.ID), State: state,
	}
}

// ec2Code is EC2's code for an impact; "" for what is not shown as scheduled
// maintenance.
func ec2Code(i maint.Impact, o EC2) string {
	switch i {
	case maint.ImpactFreeze:
		if o.ShowFreeze {
			return "system-maintenance"
		}
	case maint.ImpactReboot:
		return "system-reboot"
	case maint.ImpactRedeploy:
		return "instance-stop"
	case maint.ImpactTerminate:
		return "instance-retirement"
	}
	return ""
}

// A token is its end (seconds since 1970, 8 bytes) and a MAC over that and whose
// it is. Nothing of it is kept: a new process, or another host, refuses it, and
// clients get another.
func (c *call) token(end time.Time) string {
	b := binary.BigEndian.AppendUint64(nil, uint64(end.Unix()))
	mac := hmac.New(sha256.New, c.key[:])
	mac.Write(b)
	mac.Write([]byte(c.guest))
	return base64.URLEncoding.EncodeToString(mac.Sum(b))
}

func (c *call) validToken(token string) bool {
	b, err := base64.URLEncoding.DecodeString(token)
	if err != nil || len(b) < 8 {
		return false
	}
	end := time.Unix(int64(binary.BigEndian.Uint64(b)), 0)
	return c.now().Before(end) && hmac.Equal([]byte(token), []byte(c.token(end)))
}

func ec2Token(c *call) answer {
	if c.r.Method != http.MethodPut {
		return wrongMethod("PUT")
	}
	ttl, err := strconv.ParseUint(c.r.Header.Get(ec2TTLHeader), 10, 31)
	if err != nil || ttl < 1 || ttl > uint64(ec2MaxTTL/time.Second) {
		return refuse(http.StatusBadRequest, "a token needs its life in seconds: send "+ec2TTLHeader+" with 1 to 21600")
	}
	c.w.Header().Set(ec2TTLHeader, strconv.FormatUint(ttl, 10))
	return text(c.token(c.now().Add(time.Duration(ttl) * time.Second)))
}
