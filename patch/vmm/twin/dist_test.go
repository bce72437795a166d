package twin

import (
	"os"
	"testing"
)

// The hook that is installed is the one that this package reckons with.
func TestDistHook(t *testing.T) {
	t.Parallel()
	const file = "../../../dist/hooks/qemu.d/belay-twin"
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if string(text) != HomeHook(DefaultRoot) {
		t.Errorf("%s is not what HomeHook gives", file)
	}
	if info, err := os.Stat(file); err != nil || info.Mode()&0o111 == 0 {
		t.Errorf("%s is not executable: %v", file, err)
	}
}
