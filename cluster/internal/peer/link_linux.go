package peer

import (
	"io"
	"net"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// rawSocket reads and writes the non-blocking socket itself and waits in the runtime's
// poller only when it is empty or full: so it knows when it is about to wait, and
// nothing is allocated.
type rawSocket struct {
	raw syscall.RawConn

	// State of the one read that is under way, for the closure that is made once.
	src     source
	waited  bool
	readN   int
	readErr error
	readFn  func(fd uintptr) bool

	// The same for the one write.
	iov      []unix.Iovec
	total    int // bytes in iov
	wait     bool
	writeN   int
	writeErr error
	writeFn  func(fd uintptr) bool
}

const (
	// shortCopy is what a system call may copy while the scheduler is not told of it: a
	// few microseconds. The socket is non-blocking, so the call cannot sleep.
	shortCopy = 64 << 10
	// maxIovecs bounds one writev; the kernel takes 1024.
	maxIovecs = 1024
)

// newSocket returns the quickest socket for a connection.
func newSocket(nc net.Conn) socket {
	if sc, ok := nc.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			if within(nc) {
				unpace(raw)
			}
			s := &rawSocket{raw: raw}
			s.readFn, s.writeFn = s.doRead, s.doWrite
			return s
		}
	}
	return &streamSocket{nc}
}

// within reports whether a connection does not leave the machine.
func within(nc net.Conn) bool {
	local, _ := nc.LocalAddr().(*net.TCPAddr)
	remote, _ := nc.RemoteAddr().(*net.TCPAddr)
	return local != nil && remote != nil && (remote.IP.IsLoopback() || remote.IP.Equal(local.IP))
}

// unpace takes a connection within this machine out of the hands of a congestion control that
// paces, as BBR does: there is no network to be congested, and its timers cost a sixth of the CPU
// of long messages. Every kernel has reno; without it nothing is lost but that.
func unpace(raw syscall.RawConn) {
	_ = raw.Control(func(fd uintptr) { _ = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "reno") })
}

func (s *rawSocket) read(src source) (int, error) {
	s.src, s.waited = src, false
	if err := s.raw.Read(s.readFn); err != nil {
		return 0, err
	}
	return s.readN, s.readErr
}

// doRead runs within RawConn.Read: false means wait until readable and call again.
func (s *rawSocket) doRead(fd uintptr) bool {
	p, err := s.src.buffer()
	if err != nil {
		s.readN, s.readErr = 0, err
		return true
	}
	n, errno := call(unix.SYS_READ, fd, unsafe.Pointer(unsafe.SliceData(p)), len(p), len(p))
	switch {
	case errno == unix.EAGAIN:
		if !s.waited {
			s.waited = true
			s.src.idle()
		}
		return false
	case errno == unix.EINTR:
		return s.doRead(fd)
	case errno != 0:
		s.readN, s.readErr = 0, errno
	case n == 0:
		s.readN, s.readErr = 0, io.EOF
	default:
		s.readN, s.readErr = n, nil
	}
	return true
}

func (s *rawSocket) write(v [][]byte, wait bool) (int, error) {
	s.iov, s.total, s.wait = s.iov[:0], 0, wait
	for _, p := range v {
		if len(s.iov) == maxIovecs {
			break
		}
		if len(p) > 0 {
			s.iov = append(s.iov, unix.Iovec{Base: unsafe.SliceData(p), Len: uint64(len(p))})
			s.total += len(p)
		}
	}
	err := s.raw.Write(s.writeFn)
	clear(s.iov)
	if err != nil {
		return 0, err
	}
	return s.writeN, s.writeErr
}

func (s *rawSocket) doWrite(fd uintptr) bool {
	n, errno := call(unix.SYS_WRITEV, fd, unsafe.Pointer(unsafe.SliceData(s.iov)), len(s.iov), s.total)
	switch {
	case errno == unix.EAGAIN:
		if s.wait {
			return false
		}
		s.writeN, s.writeErr = 0, errWouldBlock
	case errno == unix.EINTR:
		return s.doWrite(fd)
	case errno != 0:
		s.writeN, s.writeErr = 0, errno
	default:
		s.writeN, s.writeErr = n, nil
	}
	return true
}

// call is read or writev. The runtime ignores SIGPIPE for sockets: EPIPE comes back.
func call(trap, fd uintptr, p unsafe.Pointer, n, bytes int) (int, unix.Errno) {
	var r uintptr
	var errno unix.Errno
	if bytes <= shortCopy {
		r, _, errno = unix.RawSyscall(trap, fd, uintptr(p), uintptr(n))
	} else {
		r, _, errno = unix.Syscall(trap, fd, uintptr(p), uintptr(n))
	}
	if errno != 0 {
		return 0, errno
	}
	return int(r), 0
}
