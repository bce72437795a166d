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

// Tasks are those that a transition waits for or, with functions ("object/function"), the
// kernel threads that are in one of them. It wants CAP_SYS_PTRACE for patch_state and
// CAP_SYS_ADMIN for stacks.
func (t Tree) Tasks(functions []string) (tasks []maint.KernelTask, err error) {
	if len(functions) > 0 {
		tasks, err = t.asleep(functions)
	} else {
		tasks, err = t.waited()
	}
	slices.SortFunc(tasks, func(a, b maint.KernelTask) int { return a.TID - b.TID })
	return tasks, err
}

// waited are those that a transition waits for. patch_state is -1 while none goes on, 1 for a
// task that runs the new code, 0 for one that does not; the target is 1 while a livepatch is
// being enabled, and 0 on its way back.
func (t Tree) waited() (tasks []maint.KernelTask, err error) {
	patches, err := t.Patches()
	if err != nil {
		return nil, err
	}
	target := ""
	changed := make(map[string]bool)
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
	if target == "" {
		return nil, nil
	}
	dirs, err := filepath.Glob(t.path("proc/[0-9]*/task/[0-9]*"))
	for _, dir := range dirs {
		if state := read(dir, "patch_state"); state != "" && state != "-1" && state != target {
			task := describe(dir, changed)
			task.Kernel = isKernel(filepath.Dir(filepath.Dir(dir)))
			tasks = append(tasks, task)
		}
	}
	return tasks, err
}

// asleep are the kernel threads that are in one of the functions.
func (t Tree) asleep(functions []string) (tasks []maint.KernelTask, err error) {
	changed := make(map[string]bool)
	for _, f := range functions {
		changed[f[strings.LastIndexByte(f, '/')+1:]] = true
	}
	processes, err := filepath.Glob(t.path("proc/[0-9]*"))
	for _, process := range processes {
		if !isKernel(process) {
			continue
		}
		// Each is a process of its own.
		if task := describe(filepath.Join(process, "task", filepath.Base(process)), changed); task.Function != "" {
			task.Kernel = true
			tasks = append(tasks, task)
		}
	}
	return tasks, err
}

// isKernel reports whether a process is a thread of the kernel's: it has no memory of its own,
// of size resident shared … all are 0.
func isKernel(process string) bool { return strings.HasPrefix(read(process, "statm"), "0 0 ") }

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
