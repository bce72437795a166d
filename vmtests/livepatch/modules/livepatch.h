/* SPDX-License-Identifier: GPL-2.0 */
/* A cumulative livepatch of FUNCS, which are of the module OBJECT (NULL: of the kernel). */
#include <linux/kernel.h>
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/seq_file.h>

#define LIVEPATCH(object, ...)						\
	static struct klp_func funcs[] = { __VA_ARGS__, { } };		\
	static struct klp_object objs[] = {				\
		{ .name = object, .funcs = funcs }, { }			\
	};								\
	static struct klp_patch patch = {				\
		.mod = THIS_MODULE, .objs = objs, .replace = true	\
	};								\
	static int __init enable(void)					\
	{								\
		return klp_enable_patch(&patch);			\
	}								\
	static void __exit gone(void) { }				\
	module_init(enable);						\
	module_exit(gone);						\
	MODULE_LICENSE("GPL");						\
	MODULE_INFO(livepatch, "Y")

#define CHANGES(old, new) { .old_name = old, .new_func = new }
