package kexec

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What the reserved memory holds after a power cut may be anything. Nothing that is read from it
// leads out of its folder, whoever made the checksums.
func FuzzNotes(f *testing.F) {
	f.Add([]byte(`{"op":"kexec-1","boot":"b","planned":[{"name":"a","uuid":"u"}],"guests":[{"uuid":"u","file":"u.save","size":1}]}`), true)
	f.Add([]byte(`{"guests":[{"uuid":"../u","file":"../u.save"}]}`), true)
	f.Add([]byte(`{"planned":[{"uuid":".."}],"guests":[{"uuid":"/","file":"/.save"}]}`), true)
	f.Add([]byte(`{"stage":"done","guest":{"uuid":"u","fate":"restored","clock":{}}}`), true)
	f.Add([]byte("{"), false)
	f.Fuzz(func(t *testing.T, text []byte, seal bool) {
		if seal {
			sum := sha256.Sum256(text)
			b, err := json.Marshal(sealed{hex.EncodeToString(sum[:]), text})
			if err != nil {
				return // it is no JSON
			}
			text = b
		}
		dir := t.TempDir()
		for _, name := range []string{manifestName, "u" + markExt, "u" + saveExt} {
			if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		m, err := readManifest(dir)
		if err == nil && !seal && !strings.Contains(string(text), "sha256") {
			t.Errorf("%q passes for a manifest", text)
		}
		for _, e := range m.Guests {
			if filepath.Dir(e.file(dir)) != dir || filepath.Dir(markFile(dir, e.UUID)) != dir {
				t.Errorf("%q leads to %s", text, e.file(dir))
			}
		}
		for _, g := range m.Planned {
			if p := filepath.Join(dir, g.UUID+saveExt); filepath.Dir(p) != dir {
				t.Errorf("%q leads to %s", text, p)
			}
		}
		_ = m.settled(dir)
		_, _ = readMark(dir, "u")
		_, _, _ = saved(filepath.Join(dir, "u"+saveExt))
		if err := os.WriteFile(filepath.Join(dir, "u"+saveExt), append([]byte(inPlaceMagic+" token\n/memory\n/rams\n"), text...), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := readLeaving(filepath.Join(dir, "u"+saveExt)); err == nil && !seal && !strings.Contains(string(text), "sha256") {
			t.Errorf("%q passes for a guest's state", text)
		}
	})
}

// What a host shows of itself may be anything, too.
func FuzzTree(f *testing.F) {
	f.Add("root=/dev/vda1 memmap=512M!4G,1G!8G memmap=0x10!0x20", "40 22 259:0 / /var/lib/belay/memory rw - ext4 /dev/pmem0 rw,dax", "HdrS")
	f.Add("memmap=!T!k memmap=0!", " - \n - - -", "")
	f.Add("memmap=99999999999999999999G!1", `1 2 3:4 / /a\040b rw - x y z`, strings.Repeat("\xff", 0x300))
	f.Fuzz(func(t *testing.T, cmdline, mounts, image string) {
		root := t.TempDir()
		tree := Tree{Root: root}
		b := []byte(image)
		if len(b) >= 0x206 {
			copy(b[0x202:], "HdrS")
		}
		for name, text := range map[string]string{"proc/cmdline": cmdline, "proc/self/mountinfo": mounts, "boot/vmlinuz": string(b)} {
			name = filepath.Join(root, name)
			if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		for _, r := range Reserved(cmdline) {
			if back := Reserved("memmap=" + r.String()); len(back) != 1 || back[0] != r {
				t.Errorf("%q: %v is written as %s, which is %v", cmdline, r, r, back)
			}
			if r.Start+r.Size < r.Start && Within([]Region{{0, 1 << 40}}, r) {
				t.Errorf("%q: %v is within memory", cmdline, r)
			}
		}
		_ = tree.Missing(DefaultDir, 1<<30)
		if release, err := tree.release("/boot/vmlinuz"); err == nil && (release == "" || strings.ContainsAny(release, " \x00")) {
			t.Errorf("the release is %q", release)
		}
	})
}
