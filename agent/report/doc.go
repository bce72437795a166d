// Package report tells what an operation came to, from what it wrote down:
//
//	Make ──► maint.Report ──► Markdown     for people and tickets
//	                     └──► JSON         for programs
//	                     └──► package page for browsers
//
// It has no clock and asks nobody: the same records make the same report.
package report
