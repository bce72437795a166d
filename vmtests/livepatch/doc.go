// Package livepatch builds kernel modules to try Belay's hot patches with (docs/rung-a-hot-patch.md):
// for the very kernel of a host, by the compiler that built it, from the sources in modules.
// What each is for stands at its head. They are signed by the tests that use them.
package livepatch
