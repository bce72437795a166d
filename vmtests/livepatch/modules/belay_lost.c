// SPDX-License-Identifier: GPL-2.0
/* A livepatch of what the kernel has not. */
#include "livepatch.h"

static int nothing(void)
{
	return 0;
}

LIVEPATCH(NULL, CHANGES("belay_no_such_function", nothing));
