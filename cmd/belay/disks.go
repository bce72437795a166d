package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"belay/agent/maint"
)

// copyDisksFlag adds --copy-disks; without a value it is all of them.
func copyDisksFlag(f *pflag.FlagSet, which *[]string) {
	f.StringSliceVar(which, "copy-disks", nil, "copy disks along that the peer does not have: all, none, or their targets, like vda,vdb; all without a value; after an = sign, as in --copy-disks=vda (default: belayd's migration.copy_disks)")
	f.Lookup("copy-disks").NoOptDefVal = maint.CopyAll
}

// migrateArgs takes one guest. --copy-disks stands alone without "=": what follows it is no
// disk.
func migrateArgs(c *cobra.Command, args []string) error {
	if len(args) > 1 && c.Flags().Changed("copy-disks") {
		return usage("%s: one argument too many: %q; disks are named with an equals sign: --copy-disks=vda,vdb", c.CommandPath(), args[1])
	}
	return exactly("a GUEST (name or UUID)")(c, args)
}

// describeDisks says how the copy of disks gets on, "" where they are not what is being
// copied now.
func describeDisks(p *maint.Job) string {
	if p.DiskTotal == 0 || p.MemoryTotal > 0 && p.Iteration > 0 {
		return ""
	}
	return fmt.Sprintf("disks: %s of %s left, %s/s", bytes(p.DiskLeft), bytes(p.DiskTotal), bytes(p.DiskPerSecond))
}

// printCopied says which disks were copied, and where the old ones are.
func printCopied(w io.Writer, op maint.Op) {
	if op.Move == nil {
		return
	}
	for _, d := range op.Move.Disks {
		row(w, "disk copied", fmt.Sprintf("%s, %s; left on %s: %s", d.Target, bytes(d.Bytes), op.Move.From, d.Path))
	}
}

// copied names disks that are copied.
func copied(disks []maint.DiskCopy) string {
	var words []string
	for _, d := range disks {
		words = append(words, fmt.Sprintf("%s (%s, of which it takes %s)", d.Target, bytes(d.Bytes), bytes(d.Allocated)))
	}
	return strings.Join(words, ", ")
}
