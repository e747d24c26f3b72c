package disk

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// file is a File of the operating system. The descriptor is taken once: it is valid
// until Close, which the caller may call only when no other call is under way.
type file struct {
	f  *os.File
	fd int
	// noNowait is set once the file system has refused RWF_NOWAIT: all reads of the
	// file then say ErrWouldBlock without asking again.
	noNowait atomic.Bool
}

func newFile(f *os.File) *file { return &file{f: f, fd: int(f.Fd())} }

func (f *file) ReadAt(p []byte, off int64) (int, error)  { return f.f.ReadAt(p, off) }
func (f *file) WriteAt(p []byte, off int64) (int, error) { return f.f.WriteAt(p, off) }

// ReadNowait is a raw system call: it cannot sleep on the disk, so the scheduler
// need not be told, which saves a large part of the cost of a 4 KiB read.
func (f *file) ReadNowait(p []byte, off int64) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if f.noNowait.Load() {
		return 0, ErrWouldBlock
	}
	iov := unix.Iovec{Base: unsafe.SliceData(p)}
	iov.SetLen(len(p))
	n, _, errno := unix.RawSyscall6(unix.SYS_PREADV2, uintptr(f.fd), uintptr(unsafe.Pointer(&iov)), 1, uintptr(off), 0, unix.RWF_NOWAIT)
	switch errno {
	case 0:
		if n == 0 {
			return 0, io.EOF
		}
		return int(n), nil
	case unix.EAGAIN, unix.EINTR:
		return 0, ErrWouldBlock
	case unix.EOPNOTSUPP, unix.ENOSYS, unix.EINVAL:
		f.noNowait.Store(true)
		return 0, ErrWouldBlock
	}
	return 0, f.failed("preadv2", errno)
}

func (f *file) Sync() error {
	return f.call("fdatasync", func() error { return unix.Fdatasync(f.fd) })
}

// PunchHole falls back to writing zeros where the file system has no holes.
func (f *file) PunchHole(off, n int64) error {
	err := f.call("punch hole", func() error {
		return unix.Fallocate(f.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
	if errors.Is(err, syscall.EOPNOTSUPP) {
		return f.writeZeros(off, n)
	}
	return err
}

func (f *file) writeZeros(off, n int64) error {
	size, err := f.Size()
	if err != nil {
		return err
	}
	zeros := make([]byte, min(n, 1<<20))
	for end := min(off+n, size); off < end; {
		w, err := f.f.WriteAt(zeros[:min(int64(len(zeros)), end-off)], off)
		if err != nil {
			return err
		}
		off += int64(w)
	}
	return nil
}

// Allocate is best effort where the file system cannot reserve.
func (f *file) Allocate(off, n int64) error {
	err := f.call("fallocate", func() error { return unix.Fallocate(f.fd, 0, off, n) })
	if errors.Is(err, syscall.EOPNOTSUPP) {
		return nil
	}
	return err
}

func (f *file) Truncate(size int64) error { return f.f.Truncate(size) }

func (f *file) Size() (int64, error) {
	info, err := f.f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

func (f *file) NextData(off int64) (start, end int64, err error) {
	err = f.call("seek data", func() (err error) {
		start, err = unix.Seek(f.fd, off, unix.SEEK_DATA)
		return err
	})
	if errors.Is(err, syscall.ENXIO) {
		return 0, 0, io.EOF
	}
	if err != nil {
		return 0, 0, err
	}
	err = f.call("seek hole", func() (err error) {
		end, err = unix.Seek(f.fd, start, unix.SEEK_HOLE)
		return err
	})
	return start, end, err
}

func (f *file) StartWriteback(off, n int64) error {
	return f.call("sync_file_range", func() error {
		return unix.SyncFileRange(f.fd, off, n, unix.SYNC_FILE_RANGE_WRITE)
	})
}

func (f *file) Close() error { return f.f.Close() }

func (f *file) call(op string, call func() error) error {
	if err := ignoringEINTR(call); err != nil {
		return f.failed(op, err)
	}
	return nil
}

func (f *file) failed(op string, err error) error {
	return &fs.PathError{Op: op, Path: f.f.Name(), Err: err}
}
