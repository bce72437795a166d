// Package lab makes virtualisation hosts out of namespaces on one machine: each
// host has its own network, UTS and mount namespace, its own libvirtd, virtlogd
// and virtlockd, host UUID, name and address, and guests migrate between them
// as between real machines. A lab of two hosts is up within a second or two.
//
//	machine (root namespaces: its own libvirtd and links are never touched)
//	│
//	├─ belay-NAME-host-a ──────────────┐ ┌─ belay-NAME-host-b ──────────────┐
//	│  virtlogd virtlockd libvirtd     │ │  virtlogd virtlockd libvirtd     │
//	│  guests (QEMU)                   │ │  guests (QEMU)                   │
//	│     │ taps                       │ │     │ taps                       │
//	│  br0  10.77.0.1/16               │ │  br0  10.77.0.2/16               │
//	│     │                            │ │     │                            │
//	│  uplink (veth)                   │ │  uplink (veth)                   │
//	└─────┼────────────────────────────┘ └─────┼────────────────────────────┘
//	   ┌──┼────────────────────────────────────┼──┐
//	   │ host-a            lan               host-b│  belay-NAME-switch
//	   │              10.77.255.254/16             │  (network namespace only;
//	   └───────────────────────────────────────────┘   observers live here)
//
// Guests attached to br0 sit on the one LAN of the lab and keep their address
// as they move. The LAN's bridge is in a namespace of the lab's own, so nothing
// appears in the machine's network and several labs, under different names, use
// the same addresses at the same time.
//
// # Files
//
// A lab keeps everything below /var/lib/belay-lab/NAME. The path is short
// because a unix socket's address ends at 108 bytes, and a QEMU monitor, seen
// from outside, is deep below it; and it is not below /run because every host
// has a /run of its own, while the lab's folder must be found under the same
// path inside and outside. In each host these folders are private, and are
// bind mounts of the folder of the same name below Host.Dir:
//
//	/etc               a copy of the machine's, less its libvirt and pki
//	                   folders, with the lab's own hosts, hostname, libvirt, pki
//	/var/lib/libvirt   /var/log/libvirt   /var/cache/libvirt
//
// /run and guests' memory that is in files ([MemoryDir]) are on tmpfs of the host's
// own, which [Host.Path] sees through the host's holder; and /sys is mounted anew, so that it shows the host's own links; it has no
// cgroups below it, and libvirt therefore makes none. All else, /tmp, /dev and
// /proc too, is the machine's. [Host.Path] translates a path inside a host to
// the one outside. Disks that several hosts use are in Lab.Shared, or are made
// by [Lab.AddDisk], for guests that are to move with their disk.
//
// After Down only /var/cache/belay-lab stays: what libvirtd has learnt about the
// machine's QEMU, which would take the next lab's first guests many seconds.
//
// # Processes
//
// There is no PID namespace: signals reach the real processes, the process IDs
// in a host's pid files are true outside, and [Host.Command] needs no fork, so
// the pid of the command is that of the program. What belongs to a host is what
// is in its network namespace: a process started in a host must not leave that,
// or [Lab.Down] will not find it. A host's mount and UTS namespaces are held by
// a sleeping process, its holder; above each libvirtd is a reaper for its guests.
//
// A migration must be peer to peer (virsh migrate --p2p), because the caller,
// being outside, cannot reach the LAN. To watch the LAN, run a program in the
// switch: ip netns exec belay-NAME-switch tcpdump.
//
// [Host.SetLink] cuts a host from the LAN, [Host.Netem] shapes what it sends by the
// kernel's means, and [Host.Emulate] delays and loses frames on any kernel.
//
// # Crashes
//
// A lab notes the process that owns it. If that process dies without
// [Lab.Down], the next [Up], under any name, removes what is left; [CleanCrashed]
// does the same by itself. A lab made with Config.Detached has no owner and
// stays until it is taken down or the machine boots.
package lab
