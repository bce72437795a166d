package journal

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"belay/agent/maint"
)

// TestUnluckyDisk: whatever a disk does to a part of the file, the journal
// opens with what it had or says that it is damaged, in words.
func TestUnluckyDisk(t *testing.T) {
	t.Parallel()
	const ops = 60
	dir := t.TempDir()
	j, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	for i := range ops {
		id := maint.OpID(fmt.Sprintf("mig-%d", i))
		if err := j.Append(accepted(id), maint.Record{Op: id, Kind: maint.RecStepStart, Step: "reserve"},
			maint.Record{Op: id, Kind: maint.RecStepNote, Step: "reserve", Text: strings.Repeat("long ", 100)}); err != nil {
			t.Fatal(err)
		}
	}
	j.Close()
	good, err := os.ReadFile(filepath.Join(dir, fileName))
	if err != nil {
		t.Fatal(err)
	}
	const page = 4096
	refused := 0
	for at := 0; at+page <= len(good); at += 3 * page {
		for what, damage := range map[string]func([]byte) []byte{
			"truncated": func(b []byte) []byte { return b[:at] },
			"torn":      func(b []byte) []byte { return b[:at+page/2] },
			"zeroed":    func(b []byte) []byte { clear(b[at : at+page]); return b },
			"garbage": func(b []byte) []byte {
				for i := range b[at : at+page] {
					b[at+i] = byte(i*7 + at)
				}
				return b
			},
			// Past what says which page it is, at where its entries begin.
			"garbage in a page": func(b []byte) []byte { copy(b[at+16:], "no journal has this in it"); return b },
		} {
			if what == "truncated" && at == 0 {
				continue // an empty file is a new journal
			}
			state := t.TempDir()
			if err := os.WriteFile(filepath.Join(state, fileName), damage(append([]byte(nil), good...)), 0o600); err != nil {
				t.Fatal(err)
			}
			j, err := Open(state)
			if err == nil {
				// One of the two pages that say what was written last can be
				// lost: that looks like a crash before the last append's end.
				if n := len(j.Ops()); n < ops-1 {
					t.Errorf("%s at %d: opens with %d of %d operations", what, at, n, ops)
				}
				j.Close()
				continue
			}
			refused++
			if !strings.Contains(err.Error(), state) || !strings.Contains(err.Error(), "move it away") {
				t.Errorf("%s at %d: %v", what, at, err)
			}
		}
	}
	if refused == 0 {
		t.Error("no damage was found: the test is wrong")
	}
}
