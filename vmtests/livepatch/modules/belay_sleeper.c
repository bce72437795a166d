// SPDX-License-Identifier: GPL-2.0
/*
 * Not a livepatch: a kernel thread that sleeps in belay_sleeper_wait for as long as the
 * parameter hold is on. No signal wakes it.
 */
#include <linux/err.h>
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/sched.h>

static bool hold = true;
module_param(hold, bool, 0644);

static struct task_struct *thread;

static noinline __noclone void belay_sleeper_wait(void)
{
	while (READ_ONCE(hold) && !kthread_should_stop())
		schedule_timeout_uninterruptible(HZ / 10);
}

static int belay_sleeper(void *unused)
{
	while (!kthread_should_stop()) {
		belay_sleeper_wait();
		schedule_timeout_uninterruptible(HZ / 10);
	}
	return 0;
}

static int __init begin(void)
{
	thread = kthread_run(belay_sleeper, NULL, "belay_sleeper");
	return PTR_ERR_OR_ZERO(thread);
}

static void __exit end(void)
{
	kthread_stop(thread);
}

module_init(begin);
module_exit(end);
MODULE_LICENSE("GPL");
MODULE_VERSION("1");
