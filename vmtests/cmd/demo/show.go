package main

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"
	"unicode/utf8"
)

// columns is how wide the output may be.
const columns = 100

// line prints one line, folded where it is too long.
func (d *demo) line(format string, args ...any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, line := range fold(strings.TrimRight(fmt.Sprintf(format, args...), " ")) {
		fmt.Fprintln(d.out, line)
	}
}

// fold breaks a line between words so that it fits the columns; what follows is indented
// further. A word that is longer than a line is cut.
func fold(line string) (lines []string) {
	indent := strings.Repeat(" ", len(line)-len(strings.TrimLeft(line, " "))+4)
	for utf8.RuneCountInString(line) > columns {
		at := strings.LastIndexByte(string([]rune(line)[:columns+1]), ' ')
		if at < len(indent) {
			return append(lines, cut(line))
		}
		lines = append(lines, strings.TrimRight(line[:at], " "))
		line = indent + strings.TrimLeft(line[at:], " ")
	}
	return append(lines, line)
}

// cut shortens a line to the columns there are.
func cut(line string) string {
	if utf8.RuneCountInString(line) <= columns {
		return line
	}
	return string([]rune(line)[:columns-1]) + "…"
}

// title begins a part.
func (d *demo) title(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	d.line("")
	d.line("%s", text)
	d.line("%s", strings.Repeat("-", utf8.RuneCountInString(text)))
}

// fact prints what is to be known about something.
func (d *demo) fact(what, format string, args ...any) {
	d.line("  %-16s%s", what, fmt.Sprintf(format, args...))
}

// now prints what happens now, with the time since the demo began.
func (d *demo) now(format string, args ...any) {
	d.line("  %5.1f s  %s", time.Since(d.begin).Seconds(), fmt.Sprintf(format, args...))
}

// at prints something that was said now, with the time since begin.
func (d *demo) at(begin time.Time, text string) {
	d.line("    %6.2f s  %s", time.Since(begin).Seconds(), text)
}

func firstLine(s string) string {
	first, _, _ := strings.Cut(s, "\n")
	return first
}

// teller is a log handler that prints what takes long, such as downloads.
type teller struct{ d *demo }

func (*teller) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelInfo }

func (t *teller) Handle(_ context.Context, r slog.Record) error {
	t.d.now("%s", firstLine(r.Message))
	return nil
}

func (t *teller) WithAttrs([]slog.Attr) slog.Handler { return t }
func (t *teller) WithGroup(string) slog.Handler      { return t }
