package probe

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"strconv"
	"strings"
)

// Sizes of the memory ruler at start, in bytes: small enough for a 128 MiB
// guest, and enough to catch a migration that forgets its last pages.
const (
	startWorkingSet = 8 * mib
	startFixed      = 4 * mib
)

// Config is what the kernel command line says.
type Config struct {
	Guest     string         // belay.hostname=
	Heartbeat netip.AddrPort // belay.heartbeat=, invalid when absent
	Interval  int            // belay.interval_us=, 0 when absent
}

// ParseCmdline reads the belay.* words of a kernel command line.
func ParseCmdline(line string) (Config, error) {
	c := Config{Guest: "guest"}
	for _, word := range strings.Fields(line) {
		key, value, _ := strings.Cut(word, "=")
		var err error
		switch key {
		case "belay.hostname":
			c.Guest = value
		case "belay.heartbeat":
			c.Heartbeat, err = netip.ParseAddrPort(value)
		case "belay.interval_us":
			c.Interval, err = strconv.Atoi(value)
		}
		if err != nil {
			return c, fmt.Errorf("kernel command line: %s: %w", key, err)
		}
	}
	return c, nil
}

// Main runs the probe in a guest until its port fails, which it does not.
// Whatever goes wrong is logged and returned.
func Main(ctx context.Context, log *slog.Logger) error {
	cfg, err := ParseCmdline(readLine("/proc/cmdline"))
	if err != nil {
		return err
	}
	boot := readLine("/proc/sys/kernel/random/boot_id")
	incarnation := GuestID(boot) + uint64(monotonic())

	sender, err := NewSender(log, cfg.Guest, incarnation, cfg.Heartbeat)
	if err != nil {
		return err
	}
	if err := sender.Set(HeartbeatSettings{IntervalUs: cfg.Interval}); err != nil {
		return err
	}
	// First the heartbeats: filling memory takes a while under emulation.
	go sender.Run(ctx)
	clock := &Clock{}
	go clock.Watch(log)

	memory, err := NewMemory(incarnation, startWorkingSet, startFixed)
	if err != nil {
		return err
	}
	go memory.Run(ctx)

	port, err := OpenPort("/dev/virtio-ports/" + PortName)
	if err != nil {
		return err
	}
	defer port.Close()
	log.Info("probe is up", "guest", cfg.Guest, "boot", boot, "heartbeat", cfg.Heartbeat)
	return (&Server{
		Log:         log,
		Guest:       cfg.Guest,
		Incarnation: incarnation,
		Memory:      memory,
		Disk:        NewDisk("/dev/vda"),
		Sender:      sender,
		Clock:       clock,
		KmsgPath:    "/dev/kmsg",
		ProcRoot:    "/proc",
		SysRoot:     "/sys",
	}).Serve(port)
}
