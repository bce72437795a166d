// Package board has the scheduled events: what may follow what, and when. It
// decides on values and does no I/O; a [Keeper] makes decisions durable before
// they are seen, and tells those who wait for them.
//
//	Announce ──► scheduled ──► Start ──► started ──► End ──► completed
//	                 └──────── Cancel ──► cancelled
//
// The promise to a guest is the notice: no event starts before its minimum notice
// has passed and not before the moment it was announced for, unless it was
// approved or the notice was waived by somebody, with a reason, in an emergency.
// It is checked in one place, [Board.Start]. An event's impact never changes: what
// would be felt more needs another event, with its own notice.
package board
