package hypervisortest_test

import (
	"bytes"
	"context"
	"path/filepath"
	"testing"
	"time"

	"belay/agent/maint"
	"belay/hypervisor/hypervisortest"
)

// site is an in-memory host under the contract.
type site struct{ *hypervisortest.Host }

func (s site) Hypervisor() hypervisortest.Hypervisor     { return s.Host }
func (s site) NewGuest(_ testing.TB, name string) string { return s.PutGuest(name) }
func (s site) StartGuest(t testing.TB, uuid string)      { s.Start(t, uuid) }
func (s site) PauseGuest(t testing.TB, uuid string)      { s.Pause(t, uuid) }
func (s site) ResumeGuest(t testing.TB, uuid string)     { s.Unpause(t, uuid) }
func (s site) DestroyGuest(t testing.TB, uuid string)    { s.Stop(t, uuid, "destroyed") }
func (s site) Hold(testing.TB)                           { s.HoldCopies() }
func (s site) Release(testing.TB, string)                { s.ReleaseCopies() }
func (s site) KillLibvirt(testing.TB)                    { s.Host.KillLibvirt() }
func (s site) RestartLibvirt(testing.TB)                 { s.Host.RestartLibvirt() }
func (s site) FreezeLibvirt(testing.TB)                  { s.Freeze() }
func (s site) ThawLibvirt(testing.TB)                    { s.Thaw() }
func (s site) NewAgentGuest(_ testing.TB, name string) string {
	return s.PutGuest(name, func(g *maint.Guest) { g.Agent = maint.AgentConnected })
}
func (s site) PutNetwork(_ testing.TB, name string, active bool) { s.Host.PutNetwork(name, active) }
func (s site) RemoveNetwork(_ testing.TB, name string)           { s.Host.RemoveNetwork(name) }
func (s site) PutPool(_ testing.TB, name string, active bool)    { s.Host.PutPool(name, active) }
func (s site) RemovePool(_ testing.TB, name string)              { s.Host.RemovePool(name) }
func (s site) PutSecret(_ testing.TB, uuid, usage string)        { s.Host.PutSecret(uuid, usage) }
func (s site) RemoveSecret(_ testing.TB, uuid string)            { s.Host.RemoveSecret(uuid) }
func (s site) NewLeasedGuest(_ testing.TB, name string) string   { return s.PutGuest(name) }
func (s site) NewFile(t testing.TB) string                       { return filepath.Join(t.TempDir(), "saved") }
func (s site) RemoveGuest(t testing.TB, uuid string) {
	s.ReleaseCopies()
	if _, err := s.Guest(context.Background(), uuid); err == nil {
		s.Remove(t, uuid)
	}
}

func (s site) NewDiskGuest(t testing.TB, name string) (uuid, path string) {
	path = "/disks/" + name + ".raw"
	s.WriteFile(t, path, bytes.Repeat([]byte("disk"), 1<<18))
	return s.PutGuest(name, func(g *maint.Guest) {
		g.Disks = []maint.Disk{{Target: "vda", Kind: "disk", Type: "file", Source: path, Format: "raw"}}
	}), path
}

func TestContract(t *testing.T) {
	w := hypervisortest.NewWorld()
	defer w.Close()
	w.SetCopy(hypervisortest.Copy{Step: 5 * time.Millisecond, Blackout: time.Millisecond})
	const hard = "Skylake-Server"
	hypervisortest.Contract(t, hypervisortest.Env{
		A:       site{w.AddHost("host-a", hypervisortest.HostOptions{Root: t.TempDir(), HugePages: []maint.PagePool{{PageBytes: 2 << 20, Free: 3}}})},
		B:       site{w.AddHost("host-b", hypervisortest.HostOptions{Root: t.TempDir(), CannotRun: []string{hard}})},
		HardCPU: "<cpu mode='custom' match='exact'><model fallback='forbid'>" + hard + "</model></cpu>",
	})
}
