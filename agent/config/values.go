package config

import (
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2/unstable"
)

// Duration and Size are structs, so that TOML's integers do not fit them: a
// number without its unit is a mistake.

// Duration is a time.Duration written as "30m" or "1h30m".
type Duration struct {
	time.Duration `toml:"-"`
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return refuse(b, "duration such as \"30m\" or \"90s\"")
	}
	d.Duration = v
	return nil
}

// Size is a number of bytes written as "512MiB" or "64GiB".
type Size struct {
	Bytes uint64 `toml:"-"`
}

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Size) UnmarshalText(b []byte) error {
	text := string(b)
	for unit, shift := range map[string]uint{"KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40} {
		number, ok := strings.CutSuffix(text, unit)
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(strings.TrimSpace(number), 10, 64)
		if err != nil || n > (1<<63)>>shift {
			break
		}
		s.Bytes = n << shift
		return nil
	}
	return refuse(b, "size such as \"512MiB\" or \"64GiB\"")
}

// refuse says that text is not what it should be. go-toml finds the line and
// the setting of this kind of error by the place of text in the document.
func refuse(text []byte, what string) error {
	return unstable.NewParserError(text, "%q is not a %s", text, what)
}

// suggest names the setting that was probably meant, or nothing.
func suggest(key []string) string {
	t := reflect.TypeFor[Config]()
	for _, k := range key[:len(key)-1] {
		next, ok := field(t, k)
		switch {
		case ok && next.Kind() == reflect.Struct:
			t = next
		case ok && next.Kind() == reflect.Map:
			t = next
		case t.Kind() == reflect.Map:
			t = t.Elem()
		default:
			return ""
		}
	}
	if t.Kind() != reflect.Struct {
		return ""
	}
	best, distance := "", 3
	last := key[len(key)-1]
	for i := range t.NumField() {
		name := t.Field(i).Tag.Get("toml")
		if d := editDistance(last, name); d < distance {
			best, distance = name, d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf("; did you mean %q?", best)
}

func field(t reflect.Type, key string) (reflect.Type, bool) {
	if t.Kind() != reflect.Struct {
		return nil, false
	}
	for i := range t.NumField() {
		if t.Field(i).Tag.Get("toml") == key {
			return t.Field(i).Type, true
		}
	}
	return nil, false
}

// editDistance is Levenshtein's.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, diagonal+cost)
		}
	}
	return row[len(b)]
}
