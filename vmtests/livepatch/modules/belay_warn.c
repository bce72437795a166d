// SPDX-License-Identifier: GPL-2.0
/* A bad mend: who reads /proc/version has the kernel warn. */
#include "livepatch.h"

static int version_show(struct seq_file *m, void *v)
{
	WARN(1, "a livepatch that warns");
	return 0;
}

LIVEPATCH(NULL, CHANGES("version_proc_show", version_show));
