package vmm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"belay/agent/maint"
)

// Survey finds out what the choice of a method needs, and changes nothing. An
// error says that libvirt or the guest's QEMU could not be asked; what merely
// stands in the way is among the facts. Of a guest that does not run, or is between
// two QEMUs, only Guest, Host, Guarded and GoesOn are found.
//
// What a QEMU can reach is tried: it is told to connect to a socket in its
// domain's folder, and to listen on one.
func Survey(ctx context.Context, h Host, p Places, uuid string) (Facts, error) {
	f, err := survey(ctx, h, p, uuid)
	if err != nil {
		return f, fmt.Errorf("cannot look at guest %s: %w", uuid, err)
	}
	return f, nil
}

func survey(ctx context.Context, h Host, p Places, uuid string) (f Facts, err error) {
	f.Guest, err = h.Guest(ctx, uuid)
	if left, keptErr := p.kept(uuid); errors.Is(err, maint.ErrNoGuest) && keptErr == nil {
		// libvirt forgets a transient guest when its QEMU ends.
		f.Guest, err = maint.Guest{UUID: left.UUID, Name: left.Guest, State: maint.GuestShutoff}, nil
	}
	if err != nil {
		return f, err
	}
	if f.Host, err = h.Info(ctx); err != nil {
		return f, err
	}
	if left, err := p.kept(f.Guest.UUID); err == nil {
		f.Guarded = left.Op
		if (&Replacement{Guest: left.Guest, UUID: left.UUID, Host: h, Places: p}).adoptable(ctx, left) {
			f.GoesOn = left.Method
			return f, nil
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		f.Guarded = "unreadable"
	}
	if !f.Guest.State.Active() {
		return f, nil
	}
	d, err := h.Describe(ctx, f.Guest.UUID)
	if err != nil {
		return f, err
	}
	if err := f.describe(d.Live); err != nil {
		return f, err
	}
	if err := f.ask(ctx, h, p); err != nil {
		return f, err
	}
	f.look(p)
	f.Reach = reach(ctx, h, p, f)
	return f, nil
}

// describe takes what the domain's XML tells.
func (f *Facts) describe(live string) error {
	d, err := parseDomain(live)
	if err != nil {
		return err
	}
	f.PowerOff, f.Emulator = d.PowerOff, d.Emulator
	if d.Sealed != nil {
		f.Sealed = d.Sealed.Type
	}
	for _, v := range d.VSocks {
		f.FixedCID = f.FixedCID || v.CID.Auto != "yes"
	}
	for _, disk := range d.Disks {
		switch {
		case disk.Transient != nil:
			f.Unfit = append(f.Unfit, fmt.Sprintf("disk %s, whose changes are thrown away when QEMU ends", disk.Target.Dev))
		case disk.Type == "nvme", disk.Type == "vhostuser", disk.Type == "vhostvdpa":
			f.Unfit = append(f.Unfit, fmt.Sprintf("disk %s of type %s", disk.Target.Dev, disk.Type))
		}
	}
	for _, fs := range d.Filesystems {
		if fs.Driver.Type == "virtiofs" {
			f.Unfit = append(f.Unfit, "a virtiofs file system")
		}
	}
	for _, dev := range f.Guest.Devices {
		switch dev.Kind {
		case "hostdev":
			f.Unfit = append(f.Unfit, "host device "+dev.Source)
		case "shmem":
			f.Unfit = append(f.Unfit, "shared memory device "+dev.Source)
		case "interface":
			switch dev.Type {
			case "hostdev", "vhostuser", "vdpa":
				f.Unfit = append(f.Unfit, fmt.Sprintf("interface %s of type %s", dev.MAC, dev.Type))
			}
		case "tpm":
			if dev.Type == "emulator" {
				f.OneWay = append(f.OneWay, "an emulated TPM, whose program libvirt ends with QEMU")
			} else {
				f.Unfit = append(f.Unfit, "a TPM of type "+dev.Type)
			}
		}
	}
	return nil
}

// ask takes what QEMU tells.
func (f *Facts) ask(ctx context.Context, q QEMU, p Places) (err error) {
	uuid := f.Guest.UUID
	if f.RunState, err = runState(ctx, q, uuid); err != nil {
		return err
	}
	if f.QEMU, err = version(ctx, q, uuid); err != nil {
		return err
	}
	if f.IgnoreShared, _, err = hasIgnoreShared(ctx, q, uuid); err != nil {
		return err
	}
	m, err := queryMigrate(ctx, q, uuid)
	if err != nil {
		return err
	}
	f.Blockers = m.Blocked
	if m.underway() {
		f.Blockers = append(f.Blockers, "a migration is under way")
	}
	var jobs []struct {
		Device string `json:"device"`
		Type   string `json:"type"`
	}
	if err := ask(ctx, q, uuid, "query-block-jobs", nil, &jobs); err != nil {
		return err
	}
	for _, j := range jobs {
		f.BlockJobs = append(f.BlockJobs, j.Type+" on "+j.Device)
	}
	return f.askMemory(ctx, q, p)
}

func (f *Facts) askMemory(ctx context.Context, q QEMU, p Places) error {
	uuid := f.Guest.UUID
	var backends []struct {
		ID    string `json:"id"`
		Size  uint64 `json:"size"`
		Share bool   `json:"share"`
	}
	if err := ask(ctx, q, uuid, "query-memdev", nil, &backends); err != nil {
		return err
	}
	var devices []struct {
		Type string `json:"type"`
		Data struct {
			Backend string `json:"memdev"` // its path
		} `json:"data"`
	}
	if err := ask(ctx, q, uuid, "query-memory-devices", nil, &devices); err != nil {
		return err
	}
	plugged := make(map[string]bool)
	for _, d := range devices {
		if d.Type == "virtio-mem" {
			plugged[filepath.Base(d.Data.Backend)] = true
		}
	}
	// The pid file is read again for the process; without it nothing is Mapped.
	f.process, _ = p.qemu(f.Guest.Name)
	for _, b := range backends {
		m := Memory{ID: b.ID, Bytes: b.Size, Shared: b.Share, Plugged: plugged[b.ID]}
		get := func(property string, v any) error {
			return ask(ctx, q, uuid, "qom-get", map[string]any{"path": "/objects/" + b.ID, "property": property}, v)
		}
		if err := get("type", &m.Kind); err != nil {
			return err
		}
		if m.Kind == "memory-backend-file" {
			if err := errors.Join(get("mem-path", &m.Path), get("discard-data", &m.Discard)); err != nil {
				return err
			}
			m.InRAM = inRAM(p.at(m.Path))
			m.Mapped, _ = p.maps(f.process.PID, p.at(m.Path))
			m.Ours = strings.HasPrefix(filepath.Base(filepath.Dir(m.Path)), fmt.Sprintf("%d-", f.Guest.ID))
		}
		f.Memory = append(f.Memory, m)
	}
	return nil
}

// look takes what the host's files tell.
func (f *Facts) look(p Places) {
	f.Copies = p.copies()
	f.CopiesFree, f.CopiesInRAM, _ = room(p.at(f.Copies))
	f.Hook = p.HookMissing()
	for _, kind := range []string{"snapshot", "checkpoint"} {
		entries, err := os.ReadDir(p.at(p.lib(), kind, f.Guest.Name))
		f.Snapshots = f.Snapshots || err == nil && len(entries) > 0
	}
	proc := p.at("/proc", strconv.Itoa(f.process.PID))
	if label, err := os.ReadFile(filepath.Join(proc, "attr/current")); err == nil {
		if text := strings.TrimRight(string(label), "\x00\n"); text != "unconfined" {
			f.Confined = text
		}
	}
	status, _ := os.ReadFile(filepath.Join(proc, "status"))
	for line := range strings.Lines(string(status)) {
		key, rest, _ := strings.Cut(line, ":")
		if ids := strings.Fields(rest); len(ids) == 4 { // real, effective, saved, of the file system
			n, _ := strconv.Atoi(ids[1])
			switch key {
			case "Uid":
				f.UID = n
			case "Gid":
				f.GID = n
			}
		}
	}
}

// HookMissing says why libvirt does not run Belay's hook, "" when it does. Each
// libvirtd that runs it for a guest, of those that it finds running too, leaves a mark.
func (p Places) HookMissing() string {
	file := filepath.Join(p.hooks(), "qemu.d/belay")
	info, err := os.Stat(p.at(file))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return file + " is not there"
	case err != nil:
		return err.Error()
	case info.Mode()&0o111 == 0:
		return file + " is not executable"
	}
	if text, err := os.ReadFile(p.at(file)); err != nil || !strings.Contains(string(text), tokenVar) {
		return file + " is not the hook of this version of Belay"
	}
	for _, pidFile := range []string{"/run/virtqemud.pid", "/run/libvirtd.pid"} {
		b, err := os.ReadFile(p.at(pidFile))
		if err != nil {
			continue
		}
		pid := strings.TrimSpace(string(b))
		n, _ := strconv.Atoi(pid)
		daemon, err := p.process(n)
		if err != nil {
			continue // of a daemon that has ended
		}
		mark, err := os.ReadFile(p.at(p.guards(), "hooked", pid))
		if err == nil && strings.TrimSpace(string(mark)) == strconv.FormatUint(daemon.Start, 10) {
			return ""
		}
		return "the libvirt daemon, process " + pid + ", has not called it: it was started before there was a hook, or has had no guest since"
	}
	return "no libvirt daemon with a hook is known"
}

// reach tries the two things that QEMU must be able to do with a socket in its
// domain's folder, and says what does not work.
func reach(ctx context.Context, q QEMU, p Places, f Facts) string {
	ln, path, err := p.listen(f.Guest.ID, "belay-try.sock", f.UID, f.GID)
	if err != nil {
		return err.Error()
	}
	defer ln.Close()
	try := func(path string, server bool) error {
		const id = "belay-try"
		uuid := f.Guest.UUID
		socket := map[string]any{"server": server,
			"addr": map[string]any{"type": "unix", "data": map[string]any{"path": path}}}
		if server {
			socket["wait"] = false
		}
		err := ask(ctx, q, uuid, "chardev-add", map[string]any{"id": id,
			"backend": map[string]any{"type": "socket", "data": socket}}, nil)
		if err != nil {
			return err
		}
		return ask(context.WithoutCancel(ctx), q, uuid, "chardev-remove", map[string]any{"id": id}, nil)
	}
	if err := try(path, false); err != nil {
		return fmt.Sprintf("QEMU cannot connect to a socket in its folder: %v", err)
	}
	in, err := p.socket(f.Guest.ID, "belay-try-in.sock")
	if err != nil {
		return err.Error()
	}
	defer os.Remove(p.at(in))
	if err := try(in, true); err != nil {
		return fmt.Sprintf("QEMU cannot listen on a socket in its folder: %v", err)
	}
	return ""
}
