// Package launch starts leashes' processes so that they outlive belayd: as a
// transient unit where systemd runs, else as a child of its own session.
//
// Neither way falls back to the other: a child of a belayd that systemd runs
// would be killed with it.
package launch
