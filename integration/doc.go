// Package integration holds the end-to-end tests: the real daemon and command line, real NBD
// clients, real faults. It imports no package of the product, so that what it knows of the product
// is what a user knows: programs, their flags, their output, and protocols.
//
// Package rig starts daemons and tools, package client is a small NBD client that can misbehave, guest
// boots a Linux guest with the kernel's own NBD client, bench measures beside other servers, layering
// guards the import rules of the whole tree.
//
// A test never skips for want of a tool: it fails and names `make tools`.
//
// Tests that measure how long something takes have the machine for themselves; those that mostly wait
// run beside one another (besideOthers), a few at a time.
package integration
