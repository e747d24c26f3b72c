// Package storage keeps objects on one node's disks: a write-ahead log with group
// commit, object files with a checksum for every 4 KiB block, and an index that is
// nothing but the file system and what the log still holds.
//
// It promises (INV-S1…S5 of the design): what was acknowledged as durable survives any
// crash; a sector only ever holds bytes that were written to it; a block that no
// unsynced write touched verifies after a crash; a small write reaches an object's file
// only when its log record is durable; rot is reported as such and never returned as
// data. Only what rots in a region that is being written directly when a crash comes is not
// told from a write that ended in part: DESIGN.md says for which that is so, and what becomes of it.
//
// On a disk:
//
//	sheep.json          identity: cluster, node and disk
//	marks               up to which version nothing of a group is missing
//	moves               groups that are on their way from or to another disk
//	wal/                the log (package internal/wal)
//	new/                files of objects that no checkpoint has covered yet
//	objects/PP-pppp/oid files of all other objects
//
// A block of an object is either pending, then its content is the newest record of the
// log, or it is what the object's file says. The checkpoint merges pending blocks into
// files, syncs those, retires the log up to where it began, and only then forgets that
// they were pending. Large writes go to the file directly, except for blocks that are
// pending: those stay in the log, so that its order remains the truth.
//
// A write is refused for want of space before anything is changed, and only if it gives content
// to blocks that have none; so what was answered always finds its place (see space). A sync or a write
// of the log that fails, for whatever reason, takes the disk out of service.
//
// The package knows nothing of nodes, copies or volumes.
package storage
