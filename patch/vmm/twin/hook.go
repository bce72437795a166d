package twin

import (
	"fmt"
	"strings"
)

// HookPath is where [HomeHook] belongs.
const HookPath = etcDir + "/hooks/qemu.d/belay-twin"

// HomeHook is the script that the host's libvirt needs for prewarmed crossings,
// and to refuse a second start of a guest that is in the twin where nothing else
// would. libvirt looks for hooks when it starts or is told to reload.
func HomeHook(root string) string {
	return fmt.Sprintf(hookHead, root, hookedDir(root)) + hookXML + hookGuard + strings.ReplaceAll(hookLink, "SIDE", atHome)
}

// hookedDir has a file for each libvirtd that has called the hook, named by its
// process ID. It survives the twin.
func hookedDir(root string) string { return root + ".hooked" }

// twinHook is the hook of the twin's own libvirt.
func twinHook(root string) string {
	return "#!/bin/sh\nroot=" + root + "\n" + hookXML + strings.ReplaceAll(hookLink, "SIDE", inTwin)
}

// hookHead: libvirt looks for hooks when it starts, not later; so the notes it
// leaves tell which libvirtd has found this one.
const hookHead = `#!/bin/sh
# Belay's hook of libvirt, for guests that visit Belay's twin of libvirtd:
# /etc/libvirt/hooks/qemu.d/belay-twin, executable. libvirt runs it as root for
# every guest that starts or stops, with the guest's name, an operation and a
# sub-operation, and the guest's XML on standard input. It calls nothing of
# libvirt, which waits for it.
root=%s
hooked=%s
[ -e "$hooked/$PPID" ] || { mkdir -p "$hooked" && : >"$hooked/$PPID"; }
[ -d "$root" ] || exit 0
`

const hookXML = `
case "$2 $3" in
"migrate begin" | "prepare begin" | "start begin") ;;
*) exit 0 ;;
esac
xml=$(cat)
uuid=${xml#*<uuid>}
uuid=${uuid%%</uuid>*}
refuse() {
	echo "belay: guest $1" >&2
	exit 1
}
# Whether this is the QEMU that belayd starts for a guest to cross into: it has
# the token of the order.
ours() {
	[ -e "$1" ] || return 1
	IFS= read -r token <"$1"
	case $xml in
	*"<qemu:env name='BELAY_TWIN' value='$token'/>"*) return 0 ;;
	esac
	return 1
}
`

// hookGuard lets a guest that is in the twin come home, by migration or with its
// memory in place, and refuses every other start. A migration is announced right
// before it: the note is believed for a minute, and once.
const hookGuard = `
case "$2" in
migrate)
	: >"$root/coming/$uuid"
	;;
prepare)
	coming=$(find "$root/coming/$uuid" -mmin -1 2>/dev/null)
	rm -f "$root/coming/$uuid"
	pid=$(cat "$root/run/qemu/$1.pid" 2>/dev/null)
	if [ -n "$pid" ] && tr '\0' '\n' <"/proc/$pid/cmdline" 2>/dev/null | grep -qx -- "$uuid"; then
		[ -n "$coming" ] || ours "$root/link/home/$uuid" ||
			refuse "$1 runs already, in Belay's twin of libvirtd: a second start would be a second guest on the same disks; belay brings it home"
	fi
	;;
esac
`

// hookLink gives a QEMU that waits for a guest the guest's memory.
const hookLink = `
[ "$2" = start ] && ours "$root/link/SIDE/$uuid" || exit 0
id=${xml#*<domain }
id=${id%%>*}
id=${id#* id=\'}
id=${id%%\'*}
{
	IFS= read -r token
	IFS= read -r rams
	set -- "$1" "$rams/$id-"*
	[ $# = 2 ] && [ -d "$2" ] || refuse "$1: no folder $rams/$id-*: libvirt keeps memory elsewhere"
	while IFS= read -r file; do
		ln -- "$file" "$2/" || refuse "$1: cannot link its memory $file into $2"
	done
} <"$root/link/SIDE/$uuid"
exit 0
`
