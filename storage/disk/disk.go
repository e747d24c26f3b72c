// Package disk is the port through which the store reaches one directory of a
// file system: small enough that a crashable in-memory disk (package disktest)
// implements it with the same contract. What is not synced may be lost, torn at
// 512-byte sectors or reordered by a crash; directory entries too, until SyncDir.
package disk

import (
	"errors"
	"io"
)

// ErrWouldBlock is returned by File.ReadNowait when the data is not in memory.
var ErrWouldBlock = errors.New("read would block")

// ErrLocked is returned by FS.Lock when another process, or this one, has the directory.
var ErrLocked = errors.New("directory is in use by another sheep")

// Flag says how OpenFile opens.
type Flag uint8

// Flags of OpenFile. Files are always opened for reading and writing.
const (
	Create    Flag = 1 << iota // create the file if it does not exist
	Exclusive                  // with Create: fail with fs.ErrExist if it does
)

// FS is one disk directory. Names are slash-separated paths below it. Errors match
// fs.ErrNotExist and fs.ErrExist, syscall.ENOSPC and syscall.EIO where those are the
// cause. All methods may be called concurrently.
type FS interface {
	OpenFile(name string, flag Flag) (File, error)
	// Remove removes a file or empty directory; durable after SyncDir of its parent.
	Remove(name string) error
	// Rename replaces newName atomically; durable after SyncDir of the parents.
	Rename(oldName, newName string) error
	// MkdirAll makes a directory and its parents; durable after SyncDir of each parent.
	MkdirAll(name string) error
	// ReadDir lists the names in a directory, sorted.
	ReadDir(name string) ([]string, error)
	// SyncDir makes the entries of a directory durable.
	SyncDir(name string) error
	// Usage tells the file system's size and what is free for this user.
	Usage() (Usage, error)
	// Lock takes the directory for this process; a second taker fails. A crash frees it.
	Lock() (io.Closer, error)
	// String is the directory's path, for messages.
	String() string
}

// Usage is the space of a file system, in bytes.
type Usage struct{ Total, Free uint64 }

// File is an open file. All methods may be called concurrently; concurrent
// overlapping reads and writes give an undefined mixture, as with pread and pwrite.
type File interface {
	io.ReaderAt // io.EOF past the end, as in package io
	io.WriterAt // extends the file
	// ReadNowait reads only if it need not wait for the disk, else ErrWouldBlock.
	// A short count is possible, as with ReadAt at the end of the file.
	ReadNowait(p []byte, off int64) (int, error)
	// Sync is fdatasync: content and size are durable, times need not be.
	Sync() error
	// PunchHole frees [off, off+n), which then reads as zero; the size stays.
	PunchHole(off, n int64) error
	// Allocate reserves space for [off, off+n) without changing content; it may extend the size.
	Allocate(off, n int64) error
	Truncate(size int64) error
	Size() (int64, error)
	// NextData returns the first run of allocated bytes at or after off (SEEK_DATA,
	// SEEK_HOLE), or io.EOF when there is none. A run may contain zeros.
	NextData(off int64) (start, end int64, err error)
	// StartWriteback asks the kernel to begin writing [off, off+n); it promises nothing.
	StartWriteback(off, n int64) error
	Close() error
}
