// Package archtest has no code of its own. Its test keeps the arrows between
// the project's packages as they were drawn, and says for each why it must not
// be drawn otherwise.
package archtest
