package live

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"belay/agent/maint"
)

// Tasks are those that a transition waits for and, with functions ("object/function"),
// those of kernel threads that are in one of them. It wants CAP_SYS_PTRACE for patch_state
// and CAP_SYS_ADMIN for stacks.
//
// patch_state is -1 while no transition goes on, 1 for a task that runs the new code, 0 for one that
// does not; the target is 1 while a livepatch is being enabled, and 0 on its way back.
func (t Tree) Tasks(functions []string) ([]maint.KernelTask, error) {
	patches, err := t.Patches()
	if err != nil {
		return nil, err
	}
	target := ""
	changed := make(map[string]bool)
	for _, f := range functions {
		changed[f[strings.LastIndexByte(f, '/')+1:]] = true
	}
	for _, p := range patches {
		if !p.Transition {
			continue
		}
		if target = "0"; p.Enabled {
			target = "1"
		}
		for _, o := range p.Objects {
			for _, f := range o.Functions {
				name, _, _ := strings.Cut(f, ",")
				changed[name] = true
			}
		}
	}
	processes, err := filepath.Glob(t.path("proc/[0-9]*"))
	if err != nil {
		return nil, err
	}
	var tasks []maint.KernelTask
	for _, process := range processes {
		// A kernel thread has no memory of its own: of size resident shared … all are 0.
		kernel := strings.HasPrefix(read(process, "statm"), "0 0 ")
		if target == "" && !(kernel && len(functions) > 0) {
			continue // without a transition nobody is waited for
		}
		dirs, err := filepath.Glob(filepath.Join(process, "task/[0-9]*"))
		if err != nil {
			return nil, err
		}
		for _, dir := range dirs {
			state := read(dir, "patch_state")
			waited := target != "" && state != "" && state != "-1" && state != target
			if !waited && !(kernel && len(functions) > 0) {
				continue
			}
			task := describe(dir, changed)
			task.Kernel = kernel
			if waited || task.Function != "" {
				tasks = append(tasks, task)
			}
		}
	}
	slices.SortFunc(tasks, func(a, b maint.KernelTask) int { return a.TID - b.TID })
	return tasks, nil
}

// read reads a small file of a task, "" if it has gone or may not be read.
func read(dir, name string) string {
	b, _ := os.ReadFile(filepath.Join(dir, name))
	return strings.TrimSpace(string(b))
}

// describe says where a task is. A line of its stack is "[<0>] function+0x1b/0x60 [module]".
func describe(dir string, changed map[string]bool) maint.KernelTask {
	tid, _ := strconv.Atoi(filepath.Base(dir))
	pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(filepath.Dir(dir))))
	task := maint.KernelTask{PID: pid, TID: tid, Comm: read(dir, "comm")}
	for line := range strings.Lines(read(dir, "stack")) {
		_, call, found := strings.Cut(strings.TrimSpace(line), "] ")
		if !found {
			continue
		}
		task.Stack = append(task.Stack, call)
		name, _, _ := strings.Cut(call, "+")
		name, _, _ = strings.Cut(name, ".") // of a clone such as f.isra.0
		if task.Function == "" && changed[name] {
			task.Function = name
		}
	}
	return task
}

// Name is a task for people.
func Name(t maint.KernelTask) string {
	s := fmt.Sprintf("%s (task %d)", t.Comm, t.TID)
	if t.Kernel {
		s = "kernel thread " + s
	}
	switch {
	case t.Function != "":
		s += ", in " + t.Function
	case len(t.Stack) > 0:
		s += ", asleep in " + t.Stack[0]
	}
	return s
}
