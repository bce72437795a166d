// Package maint is the vocabulary every other package of Belay speaks: hosts
// and guests as they are observed, operations and the records they leave,
// problems and refusals. It imports the standard library only and does no I/O.
package maint
