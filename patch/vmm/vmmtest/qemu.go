package vmmtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"belay/agent/maint"
	"belay/hypervisor"
)

// qemu is a process.
type qemu struct {
	pid          int
	dir          string // of its memory, inside the machine
	ram          string // inside the machine
	mem          *os.File
	more         map[string]string // further memory: files, inside the machine, by the backends' names
	dev          int               // how far the state of its devices is
	used         int               // ns of processor time
	ignoreShared bool
	bandwidth    uint64
	migration    string // the state of the last one
	incoming     bool   // waits for a state
	listens      bool
	chardevs     map[string]io.Closer
}

// fail is QEMU's not coming up, or dying.
func (m *Machine) fail(g maint.Guest) {
	m.Host.Stop(discard{}, g.UUID, "crashed")
	m.end(g)
}

// spawn starts a QEMU process for a guest. If there is no file with memory it
// makes one.
func (m *Machine) spawn(g maint.Guest, xml string) {
	if q := m.qemus[g.UUID]; q != nil {
		m.damage = append(m.damage, fmt.Sprintf("guest %s has two QEMUs", g.Name))
	}
	m.lastPID++
	q := &qemu{pid: m.lastPID, dir: m.ramDir(g), ram: m.ramDir(g) + "/pc.ram", bandwidth: 128 << 20,
		incoming: strings.Contains(xml, "'-incoming'"), chardevs: make(map[string]io.Closer)}
	f, err := os.OpenFile(m.at(q.ram), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		panic(err)
	}
	q.mem = f
	m.qemus[g.UUID] = q
	m.xmls[g.UUID] = xml
	proc := fmt.Sprintf("/proc/%d", q.pid)
	m.mkdir(proc+"/attr", fmt.Sprintf("%s/task/%d", proc, q.pid+1))
	m.write(proc+"/stat", fmt.Sprintf("%d (qemu-system) x) S%s %d 0 0\n", q.pid, strings.Repeat(" 0", 18), q.pid*10))
	m.write(proc+"/maps", m.mapping(q.ram))
	m.write(proc+"/attr/current", "unconfined\n")
	m.write(proc+"/status", fmt.Sprintf("Name:\tqemu\nUid:\t%[1]d\t%[1]d\t%[1]d\t%[1]d\nGid:\t%[2]d\t%[2]d\t%[2]d\t%[2]d\n", os.Getuid(), os.Getgid()))
	m.write(fmt.Sprintf("/run/libvirt/qemu/%s.pid", g.Name), strconv.Itoa(q.pid))
}

// mapping is the line of /proc/pid/maps of a file that a QEMU has mapped.
func (m *Machine) mapping(file string) string {
	var st unix.Stat_t
	if err := unix.Stat(m.at(file), &st); err != nil {
		panic(err)
	}
	return fmt.Sprintf("7f0000000000-7f0004000000 rw-s 00000000 %02x:%02x %d   %s\n", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino, file)
}

// PlugMemory gives a guest that runs further memory, a file of its owner's, as an NVDIMM has.
func (m *Machine) PlugMemory(uuid, id, file string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mkdir(filepath.Dir(file))
	m.write(file, "")
	q := m.qemus[uuid]
	q.more = map[string]string{id: file}
	m.write(fmt.Sprintf("/proc/%d/maps", q.pid), m.mapping(q.ram)+m.mapping(file))
}

// exit is a QEMU's end.
func (m *Machine) exit(g maint.Guest) {
	if q := m.qemus[g.UUID]; q != nil {
		q.mem.Close()
		for _, c := range q.chardevs {
			c.Close()
		}
		os.RemoveAll(m.at(fmt.Sprintf("/proc/%d", q.pid)))
	}
	delete(m.qemus, g.UUID)
}

// end is a QEMU's end, and libvirt's tidying up after it.
func (m *Machine) end(g maint.Guest) {
	if q := m.qemus[g.UUID]; q != nil {
		os.RemoveAll(m.at(q.dir))
	}
	m.exit(g)
	delete(m.xmls, g.UUID)
	os.Remove(m.at(fmt.Sprintf("/run/libvirt/qemu/%s.pid", g.Name)))
	os.RemoveAll(m.at(m.ramDir(g)))
	os.RemoveAll(m.at(libDir(g)))
}

func (m *Machine) ramDir(g maint.Guest) string {
	return fmt.Sprintf("%s/libvirt/qemu/%d-%s", m.Backing, g.ID, g.Name)
}
func libDir(g maint.Guest) string {
	return fmt.Sprintf("/var/lib/libvirt/qemu/domain-%d-%s", g.ID, g.Name)
}

func (m *Machine) folders(g maint.Guest) { m.mkdir(m.ramDir(g), libDir(g)) }

// put writes how far a guest is into its memory, get reads it.
func (m *Machine) put(g maint.Guest, n int) {
	if _, err := m.qemus[g.UUID].mem.WriteAt(fmt.Appendf(nil, "%08d", n), 0); err != nil {
		panic(err)
	}
}

func (m *Machine) get(q *qemu) int {
	b := make([]byte, 8)
	if _, err := q.mem.ReadAt(b, 0); err != nil {
		return 0 // never written
	}
	n, _ := strconv.Atoi(string(b))
	return n
}

// state is what a QEMU sends.
type state struct {
	UUID string
	Dev  int
}

// qmp answers commands; what it leaves is the in-memory host's.
func (m *Machine) qmp(uuid, command string, text json.RawMessage) (any, bool, error) {
	var args struct {
		URI, Path, Property, ID string
		Capabilities            []struct {
			Capability string
			State      bool
		}
		MaxBandwidth *uint64 `json:"max-bandwidth"`
		Backend      struct {
			Data struct {
				Addr   struct{ Data struct{ Path string } }
				Server bool
			}
		}
	}
	if err := json.Unmarshal(text, &args); err != nil {
		return nil, true, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	q := m.qemus[uuid]
	if q == nil {
		return nil, true, errors.New("libvirt: domain is not running")
	}
	refuse := func(desc string) (any, bool, error) {
		return nil, true, &hypervisor.QMPError{Class: "GenericError", Desc: desc}
	}
	if m.intercept != nil {
		if value, ok := m.intercept(command); ok {
			return value, true, nil
		}
	}
	none := struct{}{}
	switch command {
	case "query-status":
		if q.incoming {
			return map[string]any{"status": "inmigrate", "running": false}, true, nil
		}
	case "query-migrate-capabilities":
		return []any{map[string]any{"capability": "x-ignore-shared", "state": q.ignoreShared}}, true, nil
	case "migrate-set-capabilities":
		for _, c := range args.Capabilities {
			if c.Capability != "x-ignore-shared" {
				return refuse("unknown capability")
			}
			q.ignoreShared = c.State
		}
		return none, true, nil
	case "query-migrate-parameters":
		return map[string]any{"max-bandwidth": q.bandwidth}, true, nil
	case "migrate-set-parameters":
		if args.MaxBandwidth != nil {
			q.bandwidth = *args.MaxBandwidth
		}
		return none, true, nil
	case "query-migrate":
		return map[string]any{"status": q.migration}, true, nil
	case "query-block-jobs":
		return []any{}, true, nil
	case "query-memdev":
		all := []any{map[string]any{"id": "pc.ram", "size": 64 << 20, "share": true}}
		for id := range q.more {
			all = append(all, map[string]any{"id": id, "size": 1 << 20, "share": true})
		}
		return all, true, nil
	case "query-memory-devices":
		return []any{}, true, nil
	case "qom-get":
		switch args.Property {
		case "type":
			return "memory-backend-file", true, nil
		case "mem-path":
			if file := q.more[strings.TrimPrefix(args.Path, "/objects/")]; file != "" {
				return file, true, nil
			}
			return q.ram, true, nil
		case "discard-data":
			return false, true, nil
		}
	case "query-cpus-fast":
		if g, err := m.Host.Guest(context.Background(), uuid); err == nil && g.State == maint.GuestRunning {
			q.used += 1000
		}
		m.write(fmt.Sprintf("/proc/%d/task/%d/schedstat", q.pid, q.pid+1), fmt.Sprintf("%d 0 0\n", q.used))
		return []any{map[string]any{"thread-id": q.pid + 1}}, true, nil
	case "chardev-add":
		if m.Confined {
			return refuse("Failed to connect to socket: Permission denied")
		}
		c, err := m.chardev(args.Backend.Data.Addr.Data.Path, args.Backend.Data.Server)
		if err != nil {
			return refuse(err.Error())
		}
		q.chardevs[args.ID] = c
		return none, true, nil
	case "chardev-remove":
		if q.chardevs[args.ID] == nil {
			return refuse("Chardev not found")
		}
		q.chardevs[args.ID].Close()
		delete(q.chardevs, args.ID)
		return none, true, nil
	case "migrate_cancel":
		if q.migration == "active" {
			q.migration = "cancelled"
		}
		return none, true, nil
	case "migrate":
		return m.migrate(q, uuid, strings.TrimPrefix(args.URI, "unix:"))
	case "migrate-incoming":
		if !q.incoming || q.listens {
			return refuse("The incoming migration has already been started")
		}
		ln, err := net.Listen("unix", m.at(strings.TrimPrefix(args.URI, "unix:")))
		if err != nil {
			return refuse(err.Error())
		}
		q.listens = true
		q.chardevs["incoming"] = ln
		go m.load(q, uuid, ln)
		return none, true, nil
	}
	return nil, false, nil
}

func (m *Machine) chardev(path string, server bool) (io.Closer, error) {
	if server {
		return net.Listen("unix", m.at(path))
	}
	return net.Dial("unix", m.at(path))
}

// migrate sends a guest's state away.
func (m *Machine) migrate(q *qemu, uuid, path string) (any, bool, error) {
	q.migration = "active"
	switch {
	case m.HangMigrate:
		return struct{}{}, true, nil
	case m.FailMigrate:
		q.migration = "failed"
		if conn, err := net.Dial("unix", m.at(path)); err == nil {
			conn.Close()
		}
		return struct{}{}, true, nil
	}
	if !q.ignoreShared {
		m.damage = append(m.damage, "memory is sent, and not left where it is")
	}
	text, _ := json.Marshal(state{uuid, q.dev})
	go func() {
		conn, err := net.Dial("unix", m.at(path))
		if err == nil {
			_, err = conn.Write(text)
			conn.Close()
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		switch {
		case q.migration != "active":
			return // it was cancelled
		case err != nil || m.qemus[uuid] != q:
			q.migration = "failed"
			return
		}
		q.migration = "completed"
		m.Host.SendAway(discard{}, uuid)
	}()
	return struct{}{}, true, nil
}

// load takes a state in. A QEMU that cannot ends.
func (m *Machine) load(q *qemu, uuid string, ln net.Listener) {
	conn, err := ln.Accept()
	ln.Close()
	var b []byte
	if err == nil {
		b, err = io.ReadAll(conn)
		conn.Close()
	}
	var s state
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.qemus[uuid] != q {
		return // it was ended
	}
	if m.FailLoads > 0 {
		m.FailLoads--
		err = errors.New("load of migration failed")
	}
	if err != nil || s.UUID != uuid {
		g, lookErr := m.Host.Guest(context.Background(), uuid)
		if lookErr == nil {
			m.fail(g)
		}
		return
	}
	if !q.ignoreShared {
		m.damage = append(m.damage, "memory is expected in the stream")
	}
	q.dev, q.incoming = s.Dev, false
}

// Memory gives the files in which guests' memory is.
func (m *Machine) Memory() []string {
	found, _ := filepath.Glob(m.at(m.Backing + "/libvirt/qemu/*/*"))
	return found
}
