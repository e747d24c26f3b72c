// Package access is what operators say of targets: which volumes are its logical units, and who
// may log in to it. It is pure: values in, values and refusals out. Where they are kept, so that all gateways go
// by the same, is its callers' affair.
//
// Secrets are not part of it. A credential is a name; what is behind it each gateway reads from a
// file of its own, so that no secret is in the cluster's log, in its snapshots, or on the wire.
package access
