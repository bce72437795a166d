// Package guest makes the lab's guests.
package guest
