// Package wholehost has the tests for which a host must be a whole machine, with a systemd
// and a kernel of its own: package machine brings those up, `make vmtest` runs them.
package wholehost
