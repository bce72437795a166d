package window

import "time"

// A wall-clock time is kept as the same time in UTC, which has no gaps.

// onWall is what a clock in a zone shows.
func onWall(t time.Time, zone *time.Location) time.Time {
	_, offset := t.In(zone).Zone()
	return t.Add(time.Duration(offset) * time.Second).UTC()
}

// moment is when a clock in a zone first shows a time, or the end of the gap that
// the time is in. Later times give no earlier moments.
func moment(wall time.Time, zone *time.Location) time.Time {
	y, m, d := wall.Date()
	// In a gap, Date takes the offset before it or the one after it: the moment
	// is then on the other side. Of two moments it takes either.
	t := time.Date(y, m, d, wall.Hour(), wall.Minute(), wall.Second(), wall.Nanosecond(), zone)
	begin, end := t.ZoneBounds()
	switch shown := onWall(t, zone); {
	case shown.After(wall):
		return begin
	case shown.Before(wall):
		return end
	case begin.IsZero():
		return t
	}
	_, offset := begin.Add(-1).Zone()
	if first := wall.Add(-time.Duration(offset) * time.Second); first.Before(begin) {
		return first.In(zone)
	}
	return t
}
