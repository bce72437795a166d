// Package run takes one operation through its steps.
//
// A step has a do and an undo, both safe to run twice. The intent is in the
// journal before the effect. An operation is read down one column:
//
//	          do 1 ──► do 2 ──► do 3 (commit) ──► do 4 ──► ended: done
//	            │        │        │                 │
//	            ▼        ▼        ▼                 ▼
//	ended ◄── undo 1 ◄─ undo 2 ◄─ undo 3          ended: partly
//	(failed, aborted, blocked)
//
// A commit step is the point of no return: when it is done no undo runs any
// more, nor does an abort or the deadline count. After a crash Run is called
// again with the same steps: it does over the step that was in progress.
package run
