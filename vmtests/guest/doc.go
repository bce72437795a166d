// Package guest makes the lab's guests: small Linux systems that boot in a few
// seconds even under emulation, and carry the rulers of package probe.
//
//	img, accel, _, err := guest.Prepare(ctx, guest.DefaultCache(), log)
//	g, err := guest.Start(ctx, host, guest.Spec{Name: "web-1", Accel: accel, IP: ip, Heartbeat: to}, img)
//	c, err := g.Dial(ctx, host)
//	report, err := c.Verify(ctx)
//
// The image is Debian's cloud kernel and an initramfs made of the machine's
// busybox, guest agent and hwclock, the kernel modules for virtio, and the
// probe. There is no disk to boot from, no udev and no systemd; busybox init
// starts agent and probe again when they die. What a guest needs to know stands
// on its kernel command line:
//
//	belay.hostname=web-1 belay.ip=10.77.1.5/16 belay.gw=10.77.0.1
//	belay.heartbeat=10.77.255.254:9099 belay.interval_us=1000
//
// Everything that goes wrong inside is printed on the console, which virtlogd
// keeps on the host (see ConsolePath).
//
// A Host is an interface of two methods; package lab has it. As guests move,
// whatever talks to a guest is told the host where it is now.
package guest
