// SPDX-License-Identifier: GPL-2.0
/* A livepatch that waits for belay_sleeper's thread. */
#include <linux/sched.h>
#include "livepatch.h"

static void wait(void)
{
	schedule_timeout_uninterruptible(HZ / 10);
}

LIVEPATCH("belay_sleeper", CHANGES("belay_sleeper_wait", wait));
