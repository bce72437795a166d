// Package qemu provides the labs with a QEMU whose emulation migrates guests
// whole.
//
// Before 9.0, QEMU under TCG could lose writes of a guest that is being
// migrated: clearing the dirty bitmap forgot to bring the TCG TLB up to date
// ("physmem: Fix migration dirty bitmap coherency with TCG memory access",
// March 2024). A busy guest then arrives with stale pages, and usually panics.
// Debian 12 has 7.2; its backports have a newer one, which is unpacked here
// beside the machine's own and never installed. KVM was never concerned.
//
// Hosts that are whole machines run in it, too: under the KVM that 7.2 emulates, guests
// that were given a new QEMU with their memory soon had the host's registers (docs/rung-b-vmm.md).
package qemu

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"

	"belay/vmtests/program"
)

// firstWhole is the first version whose TCG migrates guests whole.
const firstWhole = 9

const machineOwn = "/usr/bin/qemu-system-x86_64"

// packages are what is unpacked; all else is the machine's.
func packages() []string {
	return []string{"qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios"}
}

// ForTCG returns where a QEMU is that migrates emulated guests whole: "" when
// that is the machine's own, else a folder in cacheDir with one from Debian's
// backports, as it would lie below /. It must be bound over the machine's own
// files (lab.Config.QEMU does): it finds firmware and modules there only.
func ForTCG(ctx context.Context, cacheDir string, log *slog.Logger) (string, error) {
	if major(ctx, machineOwn) >= firstWhole {
		return "", nil
	}
	dir := filepath.Join(cacheDir, "qemu")
	program := filepath.Join(dir, machineOwn)
	fail := func(err error) (string, error) {
		return "", fmt.Errorf("cannot get a QEMU of at least %d.0 from Debian's backports (or install one as %s): %w", firstWhole, machineOwn, err)
	}
	if err := os.MkdirAll(cacheDir, 0o755); err != nil {
		return fail(err)
	}
	held, err := os.OpenFile(dir+".lock", os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return fail(err)
	}
	defer held.Close()
	if err := unix.Flock(int(held.Fd()), unix.LOCK_EX); err != nil { // others may be fetching it: wait
		return fail(err)
	}
	if _, err := os.Stat(program); err == nil {
		return dir, nil
	}
	log.Info("fetching a newer QEMU, to be unpacked beside the machine's own", "folder", dir)
	tmp, err := os.MkdirTemp(cacheDir, "new-qemu-")
	if err != nil {
		return fail(err)
	}
	defer os.RemoveAll(tmp) // no longer there when all went well
	if err := unpack(ctx, tmp); err != nil {
		return fail(err)
	}
	err = errors.Join(
		os.Chmod(tmp, 0o755),
		os.RemoveAll(dir),
		os.Rename(tmp, dir))
	if err != nil {
		return fail(err)
	}
	if v := major(ctx, program); v < firstWhole {
		return fail(errors.Join(fmt.Errorf("it is of version %d or does not run", v), os.RemoveAll(dir)))
	}
	return dir, nil
}

// unpack fetches the packages with an apt configuration of its own, so that
// the machine's sources stay as they are.
func unpack(ctx context.Context, dir string) error {
	apt := filepath.Join(dir, "apt")
	for _, d := range []string{"lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(apt, d), 0o755); err != nil {
			return err
		}
	}
	defer os.RemoveAll(apt)
	list := filepath.Join(apt, "sources.list")
	if err := os.WriteFile(list, []byte("deb http://deb.debian.org/debian bookworm-backports main\n"), 0o644); err != nil {
		return err
	}
	options := []string{"-qq", "-o", "Dir::Etc::sourcelist=" + list, "-o", "Dir::Etc::sourceparts=/dev/null",
		"-o", "Dir::State::lists=" + filepath.Join(apt, "lists"), "-o", "Dir::Cache=" + filepath.Join(apt, "cache"), "-o", "APT::Sandbox::User=root"}
	if _, err := program.Output(ctx, apt, "apt-get", append(options, "update")...); err != nil {
		return err
	}
	if _, err := program.Output(ctx, apt, "apt-get", append(append(options, "download", "-t", "bookworm-backports"), packages()...)...); err != nil {
		return err
	}
	debs, err := filepath.Glob(filepath.Join(apt, "*.deb"))
	if err != nil || len(debs) != len(packages()) {
		return fmt.Errorf("apt-get fetched %d of %d packages: %w", len(debs), len(packages()), err)
	}
	for _, deb := range debs {
		if _, err := program.Output(ctx, apt, "dpkg", "-x", deb, dir); err != nil {
			return err
		}
	}
	return nil
}

// major is the major version of a QEMU, 0 when it does not run.
func major(ctx context.Context, program string) (v int) {
	out, err := exec.CommandContext(ctx, program, "--version").Output()
	if err != nil {
		return 0
	}
	if _, err := fmt.Sscanf(string(out), "QEMU emulator version %d.", &v); err != nil {
		return 0
	}
	return v
}
