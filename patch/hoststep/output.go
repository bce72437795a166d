package hoststep

import (
	"fmt"
	"strings"
	"sync"
	"unicode/utf8"
)

// keep is how many bytes of the beginning, and of the end, of a step's output
// are kept.
const keep = 32 << 10

// output keeps the beginning and the end of what is written to it.
type output struct {
	mu    sync.Mutex
	head  []byte
	tail  []byte // what followed head: at least the last keep bytes of it
	total uint64
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.total += uint64(len(b))
	n := min(len(b), keep-len(o.head))
	o.head = append(o.head, b[:n]...)
	o.tail = append(o.tail, b[n:]...)
	if len(o.tail) > 4*keep {
		o.tail = append(o.tail[:0], o.tail[len(o.tail)-keep:]...)
	}
	return len(b), nil
}

// text gives what is kept as valid UTF-8, and how many bytes are left out in
// its middle, where a line says so.
func (o *output) text() (string, uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	head, tail := o.head, o.tail
	if o.total <= 2*keep {
		return valid(string(head) + string(tail)), 0
	}
	tail = tail[len(tail)-keep:]
	// A character that was cut is left out whole.
	for i := 1; i < utf8.UTFMax && i <= len(head); i++ {
		if b := head[len(head)-i]; utf8.RuneStart(b) {
			if !utf8.FullRune(head[len(head)-i:]) {
				head = head[:len(head)-i]
			}
			break
		}
	}
	for i := 0; i < utf8.UTFMax-1 && !utf8.RuneStart(tail[0]); i++ {
		tail = tail[1:]
	}
	dropped := o.total - uint64(len(head)) - uint64(len(tail))
	return fmt.Sprintf("%s\n[%d bytes left out]\n%s", valid(string(head)), dropped, valid(string(tail))), dropped
}

func valid(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }
