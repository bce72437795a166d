package hoststep

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"unicode/utf8"
)

// TestOutput writes texts of characters of one to four bytes, in pieces of
// any size, and compares with the text itself.
func TestOutput(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(1, 2))
	alphabet := []rune("aé€😀\n")
	for range 300 {
		var want strings.Builder
		for size := random.IntN(6 * keep); want.Len() < size; {
			want.WriteRune(alphabet[random.IntN(len(alphabet))])
		}
		var o output
		for rest := []byte(want.String()); len(rest) > 0; {
			n := min(len(rest), 1+random.IntN(3*keep))
			if k, err := o.Write(rest[:n]); k != n || err != nil {
				t.Fatal(k, err)
			}
			rest = rest[n:]
		}
		got, dropped := o.text()
		if want.Len() <= 2*keep {
			if got != want.String() || dropped != 0 {
				t.Fatalf("of %d bytes %d are kept, %d dropped", want.Len(), len(got), dropped)
			}
			continue
		}
		head, tail, ok := strings.Cut(got, fmt.Sprintf("\n[%d bytes left out]\n", dropped))
		switch {
		case !ok, !strings.HasPrefix(want.String(), head), !strings.HasSuffix(want.String(), tail), !utf8.ValidString(got):
			t.Fatalf("of %d bytes %d are kept, %d dropped, and they are other ones", want.Len(), len(got), dropped)
		case len(head)+len(tail)+int(dropped) != want.Len(), len(head) < keep-3, len(tail) < keep-3, len(head) > keep, len(tail) > keep:
			t.Fatalf("of %d bytes %d and %d are kept, %d dropped", want.Len(), len(head), len(tail), dropped)
		case cap(o.head)+cap(o.tail) > 16*keep:
			t.Fatalf("it takes %d bytes", cap(o.head)+cap(o.tail))
		}
	}
}

func TestOutputThatIsNoText(t *testing.T) {
	t.Parallel()
	var o output
	for range 100 {
		_, _ = o.Write(bytes.Repeat([]byte{0xff, 0x80, 0, 0xe2}, 1000))
	}
	text, dropped := o.text()
	if !utf8.ValidString(text) || dropped == 0 || len(text) > 10*keep {
		t.Errorf("%d bytes, %d dropped", len(text), dropped)
	}
}
