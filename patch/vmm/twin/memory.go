package twin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"belay/agent/maint"
)

// memoryFiles are the files that a guest's memory is in, or why it is not in
// files that a second QEMU can map.
//
// Source: QMP query-memdev, qom-get.
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
	var sum uint64
	for _, d := range devs {
		path, err := property[string](ctx, q, uuid, d.ID, "mem-path")
		var refused interface{ Refused() bool }
		if err != nil && !errors.As(err, &refused) && !isQMP(err) {
			return nil, nil, err
		}
		switch info, statErr := os.Stat(path); {
		case err != nil || !d.Share:
			return refuse("its memory (%s) is not in a file that another process can map", d.ID)
		case statErr != nil:
			return refuse("its memory file is not to be found: %v", statErr)
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

// isQMP reports whether err is QEMU's own refusal of a command.
func isQMP(err error) bool {
	var refusal interface {
		error
		QMP() bool
	}
	return errors.As(err, &refusal)
}
