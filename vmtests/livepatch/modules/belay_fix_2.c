// SPDX-License-Identifier: GPL-2.0
/* The first mend and another: /proc/version and /proc/loadavg say so. */
#include "livepatch.h"

static int version_show(struct seq_file *m, void *v)
{
	seq_puts(m, "mended twice\n");
	return 0;
}

static int loadavg_show(struct seq_file *m, void *v)
{
	seq_puts(m, "0.00 0.00 0.00 1/1 2\n");
	return 0;
}

LIVEPATCH(NULL, CHANGES("version_proc_show", version_show), CHANGES("loadavg_proc_show", loadavg_show));
MODULE_VERSION("2"); /* with it the module bears a srcversion; the others have a build ID alone */
