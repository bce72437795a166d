#!/bin/sh
# Common to the scripts of Belay's packages: dist/package/build puts it before each.
set -e
root=${DPKG_ROOT:-}
unit=belayd.service
units="belay-kernel.socket belayd.service"

# held says what on this host is held by Belay, from the files that tell of it: belayd
# may be down, or gone.
held() {
	for notes in "$root"/run/belay/leash/*.json; do
		[ ! -e "$notes" ] || echo "guests held by operation $(basename "$notes" .json) ($notes)"
	done
	for order in "$root"/run/belay/vmm/*/order; do
		[ ! -e "$order" ] || echo "guest $(basename "${order%/order}"), between two QEMUs (${order%/order})"
	done
	for image in "$root"/var/lib/belay/memory/*.save; do # it goes when its guest runs again
		[ ! -e "$image" ] || echo "guest $(basename "$image" .save), in reserved memory, between two kernels of the host ($image)"
	done
	for pid in "$root"/run/belay-twin/run/qemu/*.pid; do
		[ ! -e "$pid" ] || echo "guest $(basename "$pid" .pid), in Belay's twin of libvirtd ($pid)"
	done
}

# running: systemd runs this very system, not one that is being put together.
running() { [ -z "$root" ] && [ -d /run/systemd/system ]; }

# reread has systemd read what was installed, and logind how long a shutdown waits.
reread() {
	systemctl --system daemon-reload
	systemctl --quiet kill -s HUP systemd-logind.service || true # it may be masked
}

# again has belayd, which runs, give way to the one that was just installed. Its unit's
# reload waits until no guest is held; operations go on. Nobody touches the leashes,
# belay-leash-*.service: they hold guests' lives in their hands.
again() {
	if ! /usr/sbin/belayd -check >/dev/null; then
		echo "belay: the belayd that runs goes on, since the new one does not accept the configuration; mend it, then: systemctl reload $unit" >&2
	elif [ "$(systemctl show --property=CanReload --value $unit)" != yes ]; then
		echo "belay: the belayd that runs goes on, since its unit is not the package's (see systemctl cat $unit); when no guest is held: systemctl restart $unit" >&2
	else
		"$@" reload $unit || echo "belay: the belayd that runs goes on; when no guest is held: systemctl restart $unit" >&2
	fi
}

# removable refuses to go while anybody would be left behind.
removable() {
	left=$(held)
	if [ -z "$left" ] && running && systemctl --quiet is-active $unit; then
		case $(belay -o json status 2>/dev/null) in
		'' | *'"operations": []'*'"reservations": []'*) ;; # belayd does not answer, or is idle
		*) left="operations, or guests on their way here (belay status)" ;;
		esac
	fi
	[ -n "$left" ] || return 0
	printf 'belay: not removed, since there would be nobody to see to:\n%s\n' "$left" >&2
	echo "belay: let belayd end its operations, or abort them (belay ops abort ID), or restore guests from reserved memory (belayd -restore), then remove it" >&2
	return 1
}
