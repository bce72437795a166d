package wire

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
)

// mark begins every greeting. Its first byte is not in it again, so looking for
// it needs no going back.
const mark = "\xBEbelay channel 1"

// number is a session's.
type number [16]byte

// kind is what a greeting says.
type kind byte

const (
	wake   kind = 'W'
	hello  kind = 'H'
	answer kind = 'A'
)

// greeting is what sides say before a session.
type greeting struct {
	kind   kind
	number number
}

// saidLen is the length of a greeting behind its mark.
const saidLen = 1 + len(number{}) + crc32.Size

func (g greeting) encode() []byte {
	b := append(append([]byte(mark), byte(g.kind)), g.number[:]...)
	return binary.BigEndian.AppendUint32(b, crc32.ChecksumIEEE(b))
}

// decode reads what follows a mark; false: the greeting is torn.
func decode(said [saidLen]byte) (greeting, bool) {
	g := greeting{kind: kind(said[0]), number: number(said[1:])}
	return g, string(g.encode()[len(mark):]) == string(said[:])
}

// errGreeting ends a session in which the other side begins another.
var errGreeting = errors.New("the other side has begun anew")

// reader reads a session's bytes and greetings from the same stream.
type reader struct {
	buf     *bufio.Reader
	matched int  // bytes of the mark that were the last ones read
	marked  bool // a mark was read, and what follows it was not
	mask    number
	pos     int // in the mask
}

// step takes the next byte, and reports whether a mark ends with it.
func (r *reader) step(b byte) bool {
	switch b {
	case mark[r.matched]:
		r.matched++
	case mark[0]:
		r.matched = 1
	default:
		r.matched = 0
	}
	r.marked = r.matched == len(mark)
	if r.marked {
		r.matched = 0
	}
	return r.marked
}

// greeting skips what is before the next greeting that is whole.
func (r *reader) greeting() (greeting, error) {
	for {
		for !r.marked {
			b, err := r.buf.ReadByte()
			if err != nil {
				return greeting{}, err
			}
			r.step(b)
		}
		r.marked = false
		var said [saidLen]byte
		if _, err := io.ReadFull(r.buf, said[:]); err != nil {
			return greeting{}, err
		}
		if g, whole := decode(said); whole {
			return g, nil
		}
	}
}

// begin has Read give the bytes of a session.
func (r *reader) begin(n number) { r.mask, r.pos, r.matched = n, 0, 0 }

// Read gives a session's bytes; errGreeting: a mark came.
func (r *reader) Read(p []byte) (int, error) {
	if r.marked {
		return 0, errGreeting
	}
	if _, err := r.buf.Peek(1); err != nil {
		return 0, err
	}
	raw, _ := r.buf.Peek(r.buf.Buffered()) // which is there
	// A mark that can be seen coming is not taken for frames first.
	switch i := bytes.Index(raw, []byte(mark)); {
	case i == 0:
		raw = raw[:len(mark)]
	case i > 0:
		raw = raw[:min(len(p), i)]
	default:
		raw = raw[:min(len(p), len(raw))]
	}
	for i, b := range raw {
		if r.step(b) {
			r.buf.Discard(i + 1)
			return 0, errGreeting
		}
	}
	n := copy(p, raw)
	r.buf.Discard(n)
	r.pos = r.mask.apply(p[:n], r.pos)
	return n, nil
}

// apply masks b, or unmasks it, from a position in the mask on, and gives the
// next position.
func (n *number) apply(b []byte, pos int) int {
	for i := range b {
		b[i] ^= n[pos]
		pos = (pos + 1) % len(n)
	}
	return pos
}
