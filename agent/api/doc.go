// Package api is how belayd is spoken to: HTTP with JSON, on a unix socket
// for the operators of this host (known by their peer credentials) and over
// mutual TLS for peer hosts and remote operators (known by certificate name).
//
// routes in server.go is the whole API on one screen: method, path, who may
// call it, what it does. The typed Client is its only counterpart.
package api
