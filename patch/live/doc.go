// Package live changes the host's kernel while it runs and guests go on: rung A.
//
// A livepatch comes as three files: the module (fix.ko), its manifest (fix.toml),
// which has the module's SHA-256, the kernel that it is for and what it covers, and
// the manifest's minisign signature (fix.toml.minisig). One signature so vouches for
// both, and no manifest can be put beside another module.
//
//	preflight ──► load ──► soak ──► finish
//	                │        │
//	                └────────┴──► undo: enabled=0, await, unload, load what was before
//
// preflight copies the files to the state folder and judges the copy; its data is the
// intent, on disk before the effect. load finds out by looking what holds, has the
// kernel load it if nothing does, and watches the transition: after 15 s it names the
// tasks that are waited for, after 60 s it gives up. soak watches the kernel's log, its
// taint, the guests and a health command. What is active is journaled at the end of
// soak, which is the point of no return; finish unloads what was replaced.
//
// enabled, transition, force, <object>/patched and <object>/<function,pos> are of
// Documentation/ABI/testing/sysfs-kernel-livepatch; replace and stack_order only of newer
// kernels. force is never written: what it was written for can never be unloaded.
//
// At most one livepatch of Belay's is active: one that is cumulative takes the place of the
// one before, any other needs a kernel without. One that somebody else has loaded
// is never replaced, for nobody could bring it back.
package live
