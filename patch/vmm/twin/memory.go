package twin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"

	"belay/agent/maint"
)

// memoryFiles are the files that a guest's memory is in, or why it is not in
// files that a second QEMU can map. memory is how much there must be, bytes.
//
// Source: QMP query-memdev, query-memory-devices, qom-get.
func memoryFiles(ctx context.Context, q QEMU, uuid, guest string, memory uint64) (files []string, problems []maint.Problem, err error) {
	refuse := func(format string, args ...any) ([]string, []maint.Problem, error) {
		return nil, []maint.Problem{*maint.Problemf(maint.CodeSourceRefuses, "guest "+guest,
			"give it <memoryBacking><source type='file'/><access mode='shared'/></memoryBacking> and start it anew, or choose another method",
			format, args...)}, nil
	}
	known, _, err := ignoresShared(ctx, q, uuid)
	if err != nil {
		return nil, nil, err
	}
	if !known {
		return refuse("its QEMU cannot leave memory where it is (%s)", capability)
	}
	text, err := q.QMP(ctx, uuid, "query-memdev", nil)
	if err != nil {
		return nil, nil, err
	}
	var devs []struct {
		ID    string `json:"id"`
		Size  uint64 `json:"size"`
		Share bool   `json:"share"`
	}
	if err := json.Unmarshal(text, &devs); err != nil {
		return nil, nil, err
	}
	if plugged, err := hasVirtioMem(ctx, q, uuid); err != nil {
		return nil, nil, err
	} else if plugged {
		return nil, []maint.Problem{*maint.Problemf(maint.CodeSourceRefuses, "guest "+guest, "choose another method",
			"has a virtio-mem device, whose memory a second QEMU would empty when it starts")}, nil
	}
	var sum uint64
	for _, d := range devs {
		path, err := property[string](ctx, q, uuid, d.ID, "mem-path")
		if errors.Is(err, maint.ErrHypervisorDown) {
			return nil, nil, err
		}
		if err != nil || !d.Share { // memory without a file has no such property
			return refuse("its memory (%s) is not in a file that another process can map", d.ID)
		}
		switch info, err := os.Stat(path); {
		case err != nil:
			return refuse("its memory file is not to be found: %v", err)
		case !info.Mode().IsRegular():
			return refuse("its memory (%s) has no name of its own in %s", d.ID, path)
		}
		if discard, err := property[bool](ctx, q, uuid, d.ID, "discard-data"); err != nil || discard {
			return refuse("its QEMU discards the memory file's content when it ends (discard-data)")
		}
		files, sum = append(files, path), sum+d.Size
	}
	if sum < memory {
		return refuse("only %d MiB of its %d MiB of memory are in files", sum>>20, memory>>20)
	}
	return files, nil, nil
}

// hasVirtioMem reports whether a guest has a virtio-mem device. QEMU before 8.1 discards all of its memory when
// it makes the device, also of a guest that is to come (hw/virtio/virtio-mem.c, virtio_mem_device_realize).
func hasVirtioMem(ctx context.Context, q QEMU, uuid string) (bool, error) {
	text, err := q.QMP(ctx, uuid, "query-memory-devices", nil)
	if err != nil {
		return false, err
	}
	var devices []struct {
		Type string `json:"type"`
	}
	if err := json.Unmarshal(text, &devices); err != nil {
		return false, err
	}
	for _, d := range devices {
		if d.Type == "virtio-mem" {
			return true, nil
		}
	}
	return false, nil
}

// property is one of a memory backend's.
func property[T any](ctx context.Context, q QEMU, uuid, id, name string) (value T, err error) {
	text, err := q.QMP(ctx, uuid, "qom-get", map[string]any{"path": "/objects/" + id, "property": name})
	if err != nil {
		return value, err
	}
	return value, json.Unmarshal(text, &value)
}

// sameFiles reports whether two lists name the same files, in the same order.
func sameFiles(a, b []string) (bool, error) {
	if len(a) != len(b) {
		return false, nil
	}
	for i := range a {
		one, err := os.Stat(a[i])
		if err != nil {
			return false, err
		}
		other, err := os.Stat(b[i])
		if err != nil {
			return false, err
		}
		if !os.SameFile(one, other) {
			return false, nil
		}
	}
	return true, nil
}

var (
	domainTag   = regexp.MustCompile(`<domain\b[^>]*>`)
	commandline = regexp.MustCompile(`(?s)\s*<qemu:commandline>.*?</qemu:commandline>`)
	// allocation has QEMU write to every page when it starts, which must not
	// be done to memory that is in use.
	allocation = regexp.MustCompile(`\s*<allocation\b[^>]*/>`)
)

// tokenName is the environment variable by which a hook knows the QEMU that it
// is to give memory to.
const tokenName = "BELAY_TWIN"

// incomingXML is portable XML for a QEMU that waits for the guest. What an
// earlier one has left in it of QEMU's options is dropped.
func incomingXML(portable, token string) (string, error) {
	text := allocation.ReplaceAllString(commandline.ReplaceAllString(portable, ""), "")
	tag := domainTag.FindString(text)
	end := strings.LastIndex(text, "</domain>")
	if tag == "" || end < 0 {
		return "", fmt.Errorf("cannot read domain XML")
	}
	const namespace = " xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'"
	text = text[:end] + "  <qemu:commandline>\n    <qemu:arg value='-incoming'/>\n    <qemu:arg value='defer'/>\n" +
		"    <qemu:env name='" + tokenName + "' value='" + token + "'/>\n  </qemu:commandline>\n" + text[end:]
	if !strings.Contains(tag, "xmlns:qemu=") {
		text = strings.Replace(text, tag, strings.TrimSuffix(tag, ">")+namespace+">", 1)
	}
	return text, nil
}
