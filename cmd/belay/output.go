package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf16"

	"belay/agent/report"
)

// print writes v as JSON or YAML, or calls table.
func (a *app) print(v any, table func(io.Writer)) error {
	switch a.format {
	case "json":
		b, err := json.MarshalIndent(v, "", "  ")
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(a.out, visible(string(b)))
		return err
	case "yaml":
		// Through JSON, so that both have the same names and values.
		b, err := json.Marshal(v)
		if err != nil {
			return err
		}
		y, err := toYAML(b)
		if err != nil {
			return err
		}
		_, err = fmt.Fprint(a.out, y)
		return err
	}
	return a.table(a.out, table)
}

// table writes a table to out with aligned columns.
func (a *app) table(out io.Writer, table func(io.Writer)) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	table(w)
	return w.Flush()
}

// row writes one line of a table.
func row(w io.Writer, cells ...any) {
	text := make([]string, len(cells))
	for i, c := range cells {
		text[i] = oneLine(fmt.Sprint(c))
	}
	fmt.Fprintln(w, strings.TrimRight(strings.Join(text, "\t"), "\t "))
}

// visible escapes what a terminal would obey rather than show, as Go and JSON
// write it: names, reasons and what libvirt says come from elsewhere. Line ends
// of JSON stay.
func visible(s string) string {
	return escape(s, func(r rune) bool { return r == '\n' }, surrogates)
}

// oneLine is visible for a text that is part of a line.
func oneLine(s string) string {
	return escape(s, func(rune) bool { return false }, surrogates)
}

// surrogates is JSON's escape of a character beyond the sixteen bits.
func surrogates(r rune) string {
	a, b := utf16.EncodeRune(r)
	return fmt.Sprintf(`\u%04x\u%04x`, a, b)
}

func escape(s string, stays func(rune) bool, long func(rune) string) string {
	if strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) && !stays(r) }) < 0 {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		switch {
		case unicode.IsPrint(r) || stays(r):
			b.WriteRune(r)
		case r > 0xffff:
			b.WriteString(long(r))
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
	}
	return b.String()
}

func bytes(n uint64) string { return report.Bytes(n) }

func span(d time.Duration) string { return report.Span(d) }

// clock writes a time of today as such, any other with its date.
func clock(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	t = t.Local()
	if time.Since(t) < 20*time.Hour {
		return t.Format(time.TimeOnly)
	}
	return t.Format(time.DateTime)
}
