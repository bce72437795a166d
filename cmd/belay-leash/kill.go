package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// killLibvirt kills the daemon that has the guests' monitors, which is virtqemud
// where there is one, else libvirtd. Both write their number below dir, which is
// /run.
func killLibvirt(dir string) error {
	var absent error
	for _, daemon := range []string{"virtqemud", "libvirtd"} {
		err := killDaemon(filepath.Join(dir, daemon+".pid"), daemon)
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ESRCH) {
			return err
		}
		absent = errors.Join(absent, err)
	}
	return absent
}

// killDaemon kills the process whose number is in a file, if it is of that name.
func killDaemon(file, name string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil || pid <= 1 {
		return fmt.Errorf("%s has no process's number: %w", file, fs.ErrNotExist)
	}
	// What is opened stays that process, whoever gets its number afterwards.
	process, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	defer unix.Close(process)
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return err
	}
	if got := strings.TrimSpace(string(comm)); got != name {
		return fmt.Errorf("%s is out of date, its process is %s: %w", file, got, fs.ErrNotExist)
	}
	return unix.PidfdSendSignal(process, unix.SIGKILL, nil, 0)
}
