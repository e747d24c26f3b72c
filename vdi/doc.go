// Package vdi serves volumes: it turns addresses of volumes into objects, and does
// copy-on-write, snapshots, clones, ownership, garbage collection, differences and checks.
//
// A Service has the node's volumes; a Volume is an open VDI or snapshot. Data moves by
// Request, asynchronously; everything else is a call with a context. What the package
// needs of the layers below is Objects and Log.
//
// It promises: a write that was answered is read by everybody who has the VDI open, through
// any node, and survives the end of the process; a flush or FUA makes it survive a power cut; a
// snapshot has every write answered before it was asked for, and none begun after it
// was there. After any crash each block of a volume is what it was or what was written.
//
// DESIGN.md in this folder tells how, and why this way.
package vdi
