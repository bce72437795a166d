// SPDX-License-Identifier: GPL-2.0
/* The first mend: /proc/version says so. */
#include "livepatch.h"

static int version_show(struct seq_file *m, void *v)
{
	seq_puts(m, "mended once\n");
	return 0;
}

LIVEPATCH(NULL, CHANGES("version_proc_show", version_show));
