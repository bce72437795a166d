package agenttest

import (
	"context"
	"encoding/json"
	"time"

	"belay/agent"
	"belay/agent/maint"
	"belay/hypervisor"
	"belay/patch/kexec/kexectest"
	"belay/patch/leash"
	"belay/patch/live"
	"belay/patch/preserve"
	"belay/patch/preserve/preservetest"
)

// mortalHost is a host whose agent can be killed before and after each call.
type mortalHost struct {
	agent.Hypervisor
	life *life
}

func (m mortalHost) around(call string) func() {
	m.life.step("before " + call)
	return func() { m.life.step("after " + call) }
}

func (m mortalHost) Guest(ctx context.Context, name string) (maint.Guest, error) {
	defer m.around("Guest")()
	return m.Hypervisor.Guest(ctx, name)
}

func (m mortalHost) Guests(ctx context.Context) ([]maint.Guest, error) {
	defer m.around("Guests")()
	return m.Hypervisor.Guests(ctx)
}

func (m mortalHost) Info(ctx context.Context) (maint.Host, error) {
	defer m.around("Info")()
	return m.Hypervisor.Info(ctx)
}

func (m mortalHost) Supplies(ctx context.Context) (maint.Supplies, error) {
	defer m.around("Supplies")()
	return m.Hypervisor.Supplies(ctx)
}

func (m mortalHost) DiskSize(ctx context.Context, uuid, disk string) (bytes, allocated uint64, err error) {
	defer m.around("DiskSize")()
	return m.Hypervisor.DiskSize(ctx, uuid, disk)
}

func (m mortalHost) HugePages(ctx context.Context) ([]maint.PagePool, error) {
	defer m.around("HugePages")()
	return m.Hypervisor.HugePages(ctx)
}

func (m mortalHost) GuestXML(ctx context.Context, uuid string) (hypervisor.GuestXML, error) {
	defer m.around("GuestXML")()
	return m.Hypervisor.GuestXML(ctx, uuid)
}

func (m mortalHost) DryRun(ctx context.Context, uuid string, p maint.MoveParams) error {
	defer m.around("DryRun")()
	return m.Hypervisor.DryRun(ctx, uuid, p)
}

func (m mortalHost) Migrate(ctx context.Context, uuid string, p maint.MoveParams) error {
	defer m.around("Migrate")()
	return m.Hypervisor.Migrate(ctx, uuid, p)
}

func (m mortalHost) AbortJob(ctx context.Context, uuid string) error {
	defer m.around("AbortJob")()
	return m.Hypervisor.AbortJob(ctx, uuid)
}

func (m mortalHost) SetMaxDowntime(ctx context.Context, uuid string, d time.Duration) error {
	defer m.around("SetMaxDowntime")()
	return m.Hypervisor.SetMaxDowntime(ctx, uuid, d)
}

func (m mortalHost) LiftBandwidth(ctx context.Context, uuid string) error {
	defer m.around("LiftBandwidth")()
	return m.Hypervisor.LiftBandwidth(ctx, uuid)
}

func (m mortalHost) StartPostCopy(ctx context.Context, uuid string) error {
	defer m.around("StartPostCopy")()
	return m.Hypervisor.StartPostCopy(ctx, uuid)
}

func (m mortalHost) HoldOut(ctx context.Context, uuid string, first, last uint16) ([]maint.Connection, error) {
	defer m.around("HoldOut")()
	return m.Hypervisor.HoldOut(ctx, uuid, first, last)
}

func (m mortalHost) HoldIn(ctx context.Context, uuid string, all []maint.Connection) (int, error) {
	defer m.around("HoldIn")()
	return m.Hypervisor.HoldIn(ctx, uuid, all)
}

func (m mortalHost) Sever(ctx context.Context, uuid string, all []maint.Connection) (int, error) {
	defer m.around("Sever")()
	return m.Hypervisor.Sever(ctx, uuid, all)
}

func (m mortalHost) ResumePostCopy(ctx context.Context, uuid string, p maint.MoveParams) error {
	defer m.around("ResumePostCopy")()
	return m.Hypervisor.ResumePostCopy(ctx, uuid, p)
}

func (m mortalHost) Job(ctx context.Context, uuid string) (maint.Job, error) {
	defer m.around("Job")()
	return m.Hypervisor.Job(ctx, uuid)
}

func (m mortalHost) CompletedJob(ctx context.Context, uuid string) (maint.Job, error) {
	defer m.around("CompletedJob")()
	return m.Hypervisor.CompletedJob(ctx, uuid)
}

func (m mortalHost) CompareCPU(ctx context.Context, domainType, arch, machine, cpuXML string) error {
	defer m.around("CompareCPU")()
	return m.Hypervisor.CompareCPU(ctx, domainType, arch, machine, cpuXML)
}

func (m mortalHost) Define(ctx context.Context, xml string) error {
	defer m.around("Define")()
	return m.Hypervisor.Define(ctx, xml)
}

func (m mortalHost) UndefineInactive(ctx context.Context, uuid string) error {
	defer m.around("UndefineInactive")()
	return m.Hypervisor.UndefineInactive(ctx, uuid)
}

func (m mortalHost) Launch(ctx context.Context, uuid string) error {
	defer m.around("Launch")()
	return m.Hypervisor.Launch(ctx, uuid)
}

func (m mortalHost) SetAutostart(ctx context.Context, uuid string, on bool) error {
	defer m.around("SetAutostart")()
	return m.Hypervisor.SetAutostart(ctx, uuid, on)
}

func (m mortalHost) SetNote(ctx context.Context, uuid, text string) error {
	defer m.around("SetNote")()
	return m.Hypervisor.SetNote(ctx, uuid, text)
}

func (m mortalHost) SetPolicy(ctx context.Context, uuid, text string) error {
	defer m.around("SetPolicy")()
	return m.Hypervisor.SetPolicy(ctx, uuid, text)
}

func (m mortalHost) Note(ctx context.Context, uuid string) (string, error) {
	defer m.around("Note")()
	return m.Hypervisor.Note(ctx, uuid)
}

func (m mortalHost) State(ctx context.Context, uuid string) (maint.GuestState, string, error) {
	defer m.around("State")()
	return m.Hypervisor.State(ctx, uuid)
}

func (m mortalHost) Suspend(ctx context.Context, uuid string) error {
	defer m.around("Suspend")()
	return m.Hypervisor.Suspend(ctx, uuid)
}

func (m mortalHost) Resume(ctx context.Context, uuid string) error {
	defer m.around("Resume")()
	return m.Hypervisor.Resume(ctx, uuid)
}

func (m mortalHost) QMP(ctx context.Context, uuid, command string, args any) (json.RawMessage, error) {
	defer m.around(command)()
	return m.Hypervisor.QMP(ctx, uuid, command, args)
}

func (m mortalHost) QuitMigrated(ctx context.Context, uuid string) error {
	defer m.around("QuitMigrated")()
	return m.Hypervisor.QuitMigrated(ctx, uuid)
}

func (m mortalHost) QuitIncoming(ctx context.Context, uuid string) error {
	defer m.around("QuitIncoming")()
	return m.Hypervisor.QuitIncoming(ctx, uuid)
}

func (m mortalHost) CreatePaused(ctx context.Context, xml string) error {
	defer m.around("CreatePaused")()
	return m.Hypervisor.CreatePaused(ctx, xml)
}

func (m mortalHost) Save(ctx context.Context, uuid, path string) error {
	defer m.around("Save")()
	return m.Hypervisor.Save(ctx, uuid, path)
}

func (m mortalHost) Restore(ctx context.Context, path string, paused bool) error {
	defer m.around("Restore")()
	return m.Hypervisor.Restore(ctx, path, paused)
}

// mortalKexec is a host's kernels, whose agent can be killed before and after each thing
// that it does with them.
type mortalKexec struct {
	*kexectest.Machine
	life *life
}

func (m mortalKexec) KexecLoad(ctx context.Context, k maint.KernelImage) error {
	m.life.step("before KexecLoad")
	defer m.life.step("after KexecLoad")
	return m.Machine.KexecLoad(ctx, k)
}

func (m mortalKexec) KexecUnload(ctx context.Context) error {
	m.life.step("before KexecUnload")
	defer m.life.step("after KexecUnload")
	return m.Machine.KexecUnload(ctx)
}

func (m mortalKexec) Kexec(ctx context.Context) error {
	m.life.step("before Kexec")
	defer m.life.step("after Kexec")
	return m.Machine.Kexec(ctx)
}

// mortalLeash is a leash whose agent can be killed before and after each word
// to it.
type mortalLeash struct {
	*preservetest.Leashes
	dir  string // of what leashes leave
	life *life
}

// Sweep implements agent.Sweeper, on files that a test has left.
func (m mortalLeash) Sweep(keep func(maint.OpID) bool) ([]leash.Status, error) {
	m.life.step("before Sweep")
	defer m.life.step("after Sweep")
	return leash.Sweep(m.dir, keep)
}

func (m mortalLeash) Arm(ctx context.Context, o preserve.Order) (preserve.Line, error) {
	m.life.step("before Arm")
	defer m.life.step("after Arm")
	l, err := m.Leashes.Arm(ctx, o)
	return mortalLine{l, m.life}, err
}

func (m mortalLeash) Attach(ctx context.Context, op maint.OpID) (preserve.Line, error) {
	m.life.step("before Attach")
	defer m.life.step("after Attach")
	l, err := m.Leashes.Attach(ctx, op)
	if l == nil {
		return nil, err
	}
	return mortalLine{l, m.life}, err
}

type mortalLine struct {
	preserve.Line
	life *life
}

func (m mortalLine) Mark(k preserve.Mark, uuid string) {
	m.life.step("before Mark " + string(k))
	defer m.life.step("after Mark " + string(k))
	m.Line.Mark(k, uuid)
}

func (m mortalLine) Disarm(ctx context.Context) ([]maint.LeashEvent, error) {
	m.life.step("before Disarm")
	defer m.life.step("after Disarm")
	return m.Line.Disarm(ctx)
}

// mortalKernel is a kernel whose agent can be killed before and after each thing that it
// has it do.
type mortalKernel struct {
	live.Kernel
	life *life
}

func (m mortalKernel) Load(ctx context.Context, a live.Artifact) error {
	m.life.step("before Load")
	defer m.life.step("after Load")
	return m.Kernel.Load(ctx, a)
}

func (m mortalKernel) Enable(ctx context.Context, name string, on bool) error {
	m.life.step("before Enable")
	defer m.life.step("after Enable")
	return m.Kernel.Enable(ctx, name, on)
}

func (m mortalKernel) Unload(ctx context.Context, name string) error {
	m.life.step("before Unload")
	defer m.life.step("after Unload")
	return m.Kernel.Unload(ctx, name)
}

// mortalPrograms are QEMUs whose agent can be killed before and after each thing that it has
// done to them.
type mortalPrograms struct {
	live.UserSpace
	life *life
}

func (m mortalPrograms) Patchable(ctx context.Context, q live.QEMU, a live.Artifact) error {
	m.life.step("before Patchable")
	defer m.life.step("after Patchable")
	return m.UserSpace.Patchable(ctx, q, a)
}

func (m mortalPrograms) Applied(ctx context.Context, q live.QEMU, a live.Artifact) (bool, error) {
	m.life.step("before Applied")
	defer m.life.step("after Applied")
	return m.UserSpace.Applied(ctx, q, a)
}

func (m mortalPrograms) Set(ctx context.Context, q live.QEMU, a live.Artifact, on bool) (time.Duration, error) {
	m.life.step("before Set")
	defer m.life.step("after Set")
	return m.UserSpace.Set(ctx, q, a, on)
}
