package hypervisortest

import (
	"context"
	"encoding/json"
	"time"

	"belay/agent/maint"
	"belay/hypervisor"
)

// Hypervisor is what hypervisor.Host and the Host of this package have in
// common. The contract is about it.
type Hypervisor interface {
	Run(ctx context.Context) error
	Close() error
	Ping(ctx context.Context) error
	Info(ctx context.Context) (maint.Host, error)
	Supplies(ctx context.Context) (maint.Supplies, error)
	DiskSize(ctx context.Context, uuid, disk string) (bytes, allocated uint64, err error)
	HugePages(ctx context.Context) ([]maint.PagePool, error)
	Guests(ctx context.Context) ([]maint.Guest, error)
	Guest(ctx context.Context, nameOrUUID string) (maint.Guest, error)
	Subscribe() (events <-chan maint.Event, cancel func())
	GuestXML(ctx context.Context, uuid string) (hypervisor.GuestXML, error)
	CompareCPU(ctx context.Context, domainType, arch, machine, cpuXML string) error
	DryRun(ctx context.Context, uuid string, p maint.MoveParams) error
	Migrate(ctx context.Context, uuid string, p maint.MoveParams) error
	AbortJob(ctx context.Context, uuid string) error
	SetMaxDowntime(ctx context.Context, uuid string, d time.Duration) error
	LiftBandwidth(ctx context.Context, uuid string) error
	StartPostCopy(ctx context.Context, uuid string) error
	ResumePostCopy(ctx context.Context, uuid string, p maint.MoveParams) error
	HoldOut(ctx context.Context, uuid string, first, last uint16) ([]maint.Connection, error)
	HoldIn(ctx context.Context, uuid string, all []maint.Connection) (int, error)
	Sever(ctx context.Context, uuid string, all []maint.Connection) (int, error)
	Job(ctx context.Context, uuid string) (maint.Job, error)
	CompletedJob(ctx context.Context, uuid string) (maint.Job, error)
	CPUTimes(ctx context.Context, uuid string, ready func(), f func(running bool, at time.Time)) error
	SetAutostart(ctx context.Context, uuid string, on bool) error
	Define(ctx context.Context, xml string) error
	UndefineInactive(ctx context.Context, uuid string) error
	Launch(ctx context.Context, uuid string) error
	SetNote(ctx context.Context, uuid, text string) error
	Note(ctx context.Context, uuid string) (string, error)
	SetPolicy(ctx context.Context, uuid, text string) error

	Warm(ctx context.Context, n int) error
	Suspend(ctx context.Context, uuid string) error
	Resume(ctx context.Context, uuid string) error
	State(ctx context.Context, uuid string) (state maint.GuestState, reason string, err error)
	GuestTime(ctx context.Context, uuid string) (time.Time, error)
	SetGuestTime(ctx context.Context, uuid string, to time.Time) error
	AgentCommand(ctx context.Context, uuid, command string, args any) (json.RawMessage, error)
	QMP(ctx context.Context, uuid, command string, args any) (json.RawMessage, error)
	QuitMigrated(ctx context.Context, uuid string) error
	QuitIncoming(ctx context.Context, uuid string) error
	CreatePaused(ctx context.Context, xml string) error
	Save(ctx context.Context, uuid, path string) error
	Restore(ctx context.Context, path string, paused bool) error
	SavedXML(ctx context.Context, path string) (xml string, err error)
}

var (
	_ Hypervisor = (*hypervisor.Host)(nil)
	_ Hypervisor = (*Host)(nil)
)
