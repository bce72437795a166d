package hypervisor

import (
	"encoding/hex"
	"strings"

	"github.com/digitalocean/go-libvirt"

	"belay/agent/maint"
)

// The words are virsh's (tools/virsh-domain-monitor.c, virsh-domain-event.c),
// in lower case for events; their order is that of libvirt's enumerations.

// word gives the i-th of words, "unknown" outside them: a newer libvirt may
// send what this list does not have.
func word(i int32, words ...string) string {
	if i < 0 || int(i) >= len(words) {
		return "unknown"
	}
	return words[i]
}

// domainState gives the state (virDomainState) and its reason
// (virDomainRunningReason, virDomainPausedReason, …).
func domainState(state, reason int32) (maint.GuestState, string) {
	switch libvirt.DomainState(state) {
	case libvirt.DomainRunning:
		return maint.GuestRunning, word(reason, "unknown", "booted", "migrated", "restored", "from snapshot",
			"unpaused", "migration canceled", "save canceled", "event wakeup", "crashed", "post-copy", "post-copy failed")
	case libvirt.DomainBlocked:
		return maint.GuestBlocked, "unknown"
	case libvirt.DomainPaused:
		return maint.GuestPaused, word(reason, "unknown", "user", "migrating", "saving", "dumping", "I/O error",
			"watchdog", "from snapshot", "shutting down", "creating snapshot", "crashed", "starting up",
			"post-copy", "post-copy failed", "API error")
	case libvirt.DomainShutdown:
		return maint.GuestShutdown, word(reason, "unknown", "user")
	case libvirt.DomainShutoff:
		return maint.GuestShutoff, word(reason, "unknown", "shutdown", "destroyed", "crashed", "migrated", "saved",
			"failed", "from snapshot", "daemon")
	case libvirt.DomainCrashed:
		return maint.GuestCrashed, word(reason, "unknown", "panicked")
	case libvirt.DomainPmsuspended:
		return maint.GuestSuspended, "unknown"
	}
	return maint.GuestNoState, "unknown"
}

// lifecycleWords gives a virDomainEventType and its detail.
func lifecycleWords(event, detail int32) (change, why string) {
	switch libvirt.DomainEventType(event) {
	case libvirt.DomainEventDefined:
		return "defined", word(detail, "added", "updated", "renamed", "snapshot")
	case libvirt.DomainEventUndefined:
		return "undefined", word(detail, "removed", "renamed")
	case libvirt.DomainEventStarted:
		return "started", word(detail, "booted", "migrated", "restored", "snapshot", "event wakeup")
	case libvirt.DomainEventSuspended:
		return "suspended", word(detail, "paused", "migrated", "i/o error", "watchdog", "restored", "snapshot",
			"api error", "post-copy", "post-copy error")
	case libvirt.DomainEventResumed:
		return "resumed", word(detail, "unpaused", "migrated", "snapshot", "post-copy", "post-copy error")
	case libvirt.DomainEventStopped:
		return "stopped", word(detail, "shutdown", "destroyed", "crashed", "migrated", "saved", "failed", "snapshot", "daemon")
	case libvirt.DomainEventShutdown:
		return "shutdown", word(detail, "finished", "finished after guest request", "finished after host request")
	case libvirt.DomainEventPmsuspended:
		return "pmsuspended", word(detail, "memory", "disk")
	case libvirt.DomainEventCrashed:
		return "crashed", word(detail, "panicked", "crashloaded")
	}
	return "unknown", "unknown"
}

// agentChange gives a virConnectDomainEventAgentLifecycleState, which begins
// at 1.
func agentChange(state int32) string { return word(state, "unknown", "connected", "disconnected") }

// agentReason gives a virConnectDomainEventAgentLifecycleReason.
func agentReason(reason int32) string {
	return word(reason, "unknown", "domain started", "channel event")
}

// jobState gives a virDomainJobType.
func jobState(t int32) string {
	return word(t, "none", "bounded", "unbounded", "completed", "failed", "cancelled")
}

// Words of jobOperation that are used elsewhere.
const (
	migrationIn  = "migration in"
	migrationOut = "migration out"

	// catchingUp is no word of libvirt's: see settle.
	catchingUp = "catching up"
)

// jobOperation gives a virDomainJobOperation.
func jobOperation(op int32) string {
	return word(op, "unknown", "start", "save", "restore", migrationIn, migrationOut, "snapshot",
		"snapshot revert", "dump", "backup", "snapshot delete")
}

// formatUUID gives the text form of a UUID.
func formatUUID(u libvirt.UUID) string {
	s := hex.EncodeToString(u[:])
	return s[:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:]
}

// parseUUID reads the text form; like libvirt it takes it without hyphens too.
func parseUUID(s string) (u libvirt.UUID, ok bool) {
	raw, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(raw) != len(u) {
		return u, false
	}
	return libvirt.UUID(raw), true
}
