// Package hoststep runs one thing on the host while guests are held, and
// tells the truth about how it went.
//
// A command is run by a supervisor: a process of its own (Supervise), which
// outlives belayd. Where systemd runs, the supervisor is the main process of a
// transient unit, belay-step-NAME.service; elsewhere it is a child of belayd
// in a session of its own. It is the subreaper of all that the command starts,
// so no double fork escapes it, and it keeps the step's time itself.
//
//	belayd ─ Prepare ─► NAME/spec.json
//	   │                   │
//	   │ starts            ▼
//	   ├──────────► supervisor ──► NAME/sock         it waits
//	   │                   │
//	   │ Run: begin        ▼
//	   ├──────────► supervisor ──► NAME/claim.json   it is begun, once
//	   │                   │
//	   │ look, end         │ starts, reaps, reads the output of, ends
//	   └───────────►       ▼
//	                command and all its descendants
//	                       │
//	                       ▼
//	                  NAME/result.json               how it went
//
// Prepare is for who wants a step to begin without delay; Run does it where
// nobody has. A supervisor that is not told to begin ends after a while.
//
// The claim is made by whoever comes first: the supervisor that was told to
// begin, and then begins the command, or who gives it up (End, or a supervisor
// that was told nothing), after which it will never begin. A result is written
// once. So a belayd that was killed at any point finds one of these:
//
//	no folder          nothing was begun
//	no claim           not begun; End sees to it that it never will be, and has
//	                   the supervisor go that may wait for the word. Run tells
//	                   it to begin, or starts another if it was killed
//	claim, sock        it runs: wait for it, or end it
//	claim, no answer   the supervisor was killed: what is left is found by the
//	                   mark in its environment, and ended; how it went is not known
//	result             it has ended, or was given up
//
// A command that ends by itself may leave processes behind (a daemon that it
// restarted): they are left alone, and the supervisor stays to read what they
// write for as long as they hold the step's output. A command that is ended
// takes all its descendants with it.
//
// A job of a systemd unit needs no supervisor: systemd runs it. It cannot be
// ended, only no longer waited for: a restart cancelled half-way would leave
// the unit stopped.
//
// All files are below one folder, to be on tmpfs; nothing is synced.
package hoststep
