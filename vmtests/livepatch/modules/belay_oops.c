// SPDX-License-Identifier: GPL-2.0
/* A bad mend: who reads /proc/version is killed by an Oops, and holds no lock that others want. */
#include "livepatch.h"

static int version_show(struct seq_file *m, void *v)
{
	return READ_ONCE(*(int *)16);
}

LIVEPATCH(NULL, CHANGES("version_proc_show", version_show));
