package machine

import (
	"context"
	"errors"
	"os"
	"path/filepath"
)

// logScript prints what a host knows of what happened.
const logScript = `set +e
echo '== failed units'; systemctl --no-pager --failed
echo '== operations'; timeout 20 belay ops list
echo '== guests'; timeout 20 virsh list --all
for guest in $(timeout 20 virsh list --name); do
	echo "== $guest, twice, a second apart"
	for hmp in 'info status' 'info registers' 'info status' 'info registers'; do
		timeout 20 virsh qemu-monitor-command "$guest" --hmp "$hmp"
		[ "$hmp" = 'info status' ] || sleep 1
	done
done
tail -n +1 /var/log/libvirt/qemu/*.log
echo '== journal, of all boots'
journalctl --no-pager --output=short-precise`

// CollectLogs copies the hosts' consoles, QEMU's words and, from hosts that answer, the
// journals of all their boots into the folder, one subfolder for each host. It goes on
// after an error.
func (l *Lab) CollectLogs(ctx context.Context, dir string) error {
	return l.each(func(h *Host) error {
		var errs []error
		for _, name := range []string{"console", "qemu.log"} {
			if _, err := os.Stat(h.file(name)); err == nil {
				errs = append(errs, copyFile(h.file(name), filepath.Join(dir, h.Name, name)))
			}
		}
		if h.dead() {
			return errors.Join(errs...)
		}
		text, err := h.Script(ctx, logScript)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, h.Name, "journal"), []byte(text), 0o644)
		}
		return errors.Join(append(errs, err)...)
	})
}
