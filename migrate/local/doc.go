// Package local looks at the host that it runs on, outside libvirt: at files,
// links, sockets and ports that guests use, for either side of a migration.
//
// What it is asked for is named by a guest's definition, or by a peer. No file is
// opened: a path can lead to a device, or to storage that is gone, where open
// waits for ever. Even a look can wait there, so each has a goroutine of its own
// that is left behind when its time is up; only so many can be.
//
// That a path leads to the same storage on two hosts is proved by a mark: an empty
// file of a name that nobody can guess, which the source puts beside the disk for
// the time of one question. A killed belayd leaves no mark for good: what marks it
// is about to make is on disk first, and its next start removes them (Sweep).
package local
