// Package journal is the intent log of one host's agent: an append-only
// sequence of maint.Record on bbolt, on disk before the effect it announces.
//
// State is the fold of the records, history and audit read the same records:
// there is no second place where the truth could differ. Fold is the whole
// transition table of an operation.
//
//	Append ──► check against Fold ──► bbolt transaction (fsync) ──► state, watchers
package journal
