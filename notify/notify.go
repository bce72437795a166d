package notify

import (
	"context"
	"net/netip"
	"time"

	"belay/agent/maint"
)

// Address is where guests ask for metadata in every public cloud.
const Address = "169.254.169.254"

// Document is what a guest is shown of its events.
type Document struct {
	// Incarnation is another with every change, and never one that was used
	// before, also not on another host.
	Incarnation uint64
	// Events are those scheduled and started, the oldest first.
	Events []maint.ScheduledEvent
}

// Source is what views show to guests, and what guests can do. A guest is named
// by its UUID, which is of whoever asks: none can name another.
type Source interface {
	// Document is the guest's, with a channel that is closed when it has
	// changed. It is shared: who is given it must not change it.
	Document(guest string) (Document, <-chan struct{})
	// Approve has an event start as soon as it can. It is no error if that has
	// started, or has ended recently. maint.ErrUnknownEvent: it is not, and was
	// not recently, one of the guest's.
	Approve(ctx context.Context, guest string, id maint.EventID) error
	// History is the guest's events that are over, the latest first.
	History(guest string) []maint.ScheduledEvent
	// Instance is the guest itself; false: it is not known (any more).
	Instance(guest string) (Instance, bool)

	// Listen has events wait for a program, from the next one on, and Unlisten
	// no longer. It may be done over.
	Listen(ctx context.Context, guest string, l maint.Listener) error
	Unlisten(ctx context.Context, guest, name string) error
	// Ready says that a program that is waited for is.
	Ready(ctx context.Context, guest, name string, id maint.EventID) error

	// Maintenance is the campaigns that the guest is in. Times to book are for
	// campaigns that take them.
	Maintenance(guest string) []maint.Campaign
	// Book picks the moment, the zero time for now. A refusal says what would do.
	Book(ctx context.Context, guest string, id maint.CampaignID, at time.Time) error
	// Defer takes a booked moment back, and leaves it to the deadline or a later
	// booking.
	Defer(ctx context.Context, guest string, id maint.CampaignID) error
}

// Instance is what a guest may know of itself.
type Instance struct {
	Name, UUID string
	Interfaces []Interface
}

// Interface is a network interface of a guest.
type Interface struct {
	MAC   string // "52:54:00:12:34:56"
	Addrs []netip.Addr
}

type guestKey struct{}

// WithGuest marks what is done on behalf of a guest: identity is established
// once for a connection.
func WithGuest(ctx context.Context, uuid string) context.Context {
	return context.WithValue(ctx, guestKey{}, uuid)
}

// GuestOf is who asks, false where nobody knows.
func GuestOf(ctx context.Context) (uuid string, known bool) {
	uuid, known = ctx.Value(guestKey{}).(string)
	return uuid, known && uuid != ""
}
