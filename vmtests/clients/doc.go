// Package clients tests what guests are told with programs that others have
// written for other clouds, and that know nothing of Belay: a Pacemaker cluster
// with its agent for Azure's scheduled events, cloud-init, Google's and Amazon's
// libraries. Each runs in a network namespace where the views answer on
// 169.254.169.254, out of a board that is kept in a journal.
//
// BELAY_LAB=skip leaves all of them out.
package clients
