// Package disktest is a disk in memory that can lose power. It keeps the contract of
// package disk to the letter and gives nothing beyond it: what was not synced may be
// lost, torn at 512-byte sectors and reordered, each sector by itself; directory
// entries are volatile until SyncDir. A seed decides what survives, so that every
// failure can be had again.
//
// Beside power cuts it injects errors and delays (Hook), a full disk (SetCapacity) and
// rot (Flip), and it counts operations, so that a test can fail each of them in turn.
//
// Conform is the suite that every implementation of disk.FS has to pass.
package disktest
