package live

import (
	"crypto/sha256"
	"encoding/hex"
	"io"
	"os"

	"aead.dev/minisign"

	"belay/agent/maint"
	"belay/patch/internal/linux"
)

// CheckFile reads a file of any kind once, and gives its SHA-256 in hexadecimal. Where a
// minisign signature is named, it must be by a key that is trusted.
func CheckFile(name, signature, keys string) (sum string, err error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	r := minisign.NewReader(io.TeeReader(f, h))
	if _, err := io.Copy(io.Discard, r); err != nil {
		return "", err
	}
	sum = hex.EncodeToString(h.Sum(nil))
	if signature == "" {
		return sum, nil
	}
	text, err := linux.ReadFile(signature, maxManifest)
	if err != nil {
		return sum, err
	}
	trusted, err := ReadKeys(keys)
	if err != nil {
		return sum, err
	}
	for _, k := range trusted {
		if r.Verify(k.PublicKey, text) {
			return sum, nil
		}
	}
	return sum, maint.Problemf(maint.CodePatchSigned, "file "+name, "have it signed (minisign -Sm FILE) by somebody whose key is in "+keys,
		"is not signed by a key that is trusted here, or has been changed since")
}
