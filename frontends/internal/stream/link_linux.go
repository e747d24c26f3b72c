package stream

import (
	"io"
	"net"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// rawLink reads and writes the non-blocking socket itself, waiting in the runtime's
// poller only when the socket is empty or full: many requests per read, many
// replies per writev, and no allocation.
type rawLink struct {
	raw syscall.RawConn

	// State of the one receive that is under way, for the closure that is built once.
	src     receiver
	waited  bool
	recvN   int
	recvErr error
	recvIOV [2]unix.Iovec
	recvFn  func(fd uintptr) bool

	// The same for the one send.
	sendIOV  []unix.Iovec
	sendWait bool
	sendN    int
	sendErr  error
	sendFn   func(fd uintptr) bool
}

// maxCopy bounds what one system call copies, in bytes: some tens of microseconds, for which
// the scheduler is not told. The socket is non-blocking, so the call cannot sleep longer;
// telling costs a wake-up of another thread whenever a call takes longer than 20 µs.
const maxCopy = 256 << 10

// newLink returns the quickest link for conn.
func newLink(conn net.Conn) link {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return &connLink{conn: conn}
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return &connLink{conn: conn}
	}
	if tcp, ok := conn.(*net.TCPConn); ok && tcp.RemoteAddr().(*net.TCPAddr).IP.IsLoopback() {
		unpace(raw)
	}
	l := &rawLink{raw: raw}
	l.recvFn, l.sendFn = l.doRecv, l.doSend
	return l
}

// unpace takes a connection within this machine out of the hands of a congestion control
// that paces: where BBR is the default it halves the rate of replies of a megabyte, and there
// is no network to be congested. Every kernel has reno; without it nothing is lost but that.
func unpace(raw syscall.RawConn) {
	_ = raw.Control(func(fd uintptr) { _ = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "reno") })
}

func (l *rawLink) recv(src receiver) (int, error) {
	l.src, l.waited = src, false
	if err := l.raw.Read(l.recvFn); err != nil {
		return 0, err
	}
	return l.recvN, l.recvErr
}

// doRecv runs within RawConn.Read: false means wait until readable and call again.
func (l *rawLink) doRecv(fd uintptr) bool {
	p, q, err := l.src.buffers()
	if err != nil {
		l.recvN, l.recvErr = 0, err
		return true
	}
	if len(p) >= maxCopy {
		p, q = p[:maxCopy], nil
	}
	iov := l.recvIOV[:1]
	setIovec(&iov[0], p)
	if len(q) > 0 {
		iov = l.recvIOV[:2]
		setIovec(&iov[1], q)
	}
	n, errno := vectorCall(unix.SYS_READV, fd, iov)
	clear(iov)
	switch {
	case errno == unix.EAGAIN:
		if !l.waited {
			l.waited = true
			l.src.idle()
		}
		return false
	case errno == unix.EINTR:
		return l.doRecv(fd)
	case errno != 0:
		l.recvN, l.recvErr = 0, errno
	case n == 0:
		l.recvN, l.recvErr = 0, io.EOF
	default:
		l.recvN, l.recvErr = n, nil
	}
	return true
}

func (l *rawLink) trySend(v [][]byte) (int, error) { return l.sendVector(v, false) }
func (l *rawLink) send(v [][]byte) (int, error)    { return l.sendVector(v, true) }

func (l *rawLink) sendVector(v [][]byte, wait bool) (int, error) {
	l.load(v)
	l.sendWait = wait
	err := l.raw.Write(l.sendFn)
	clear(l.sendIOV)
	if err != nil {
		return 0, err
	}
	return l.sendN, l.sendErr
}

// maxIovecs bounds one writev; the kernel takes 1024.
const maxIovecs = 1024

// load builds the io vector. Replies that lie next to each other in an arena become
// one entry. No more than maxCopy is loaded.
func (l *rawLink) load(v [][]byte) {
	iov, total := l.sendIOV[:0], 0
	var end *byte // one past the previous entry
	for _, p := range v {
		if len(p) == 0 {
			continue
		}
		start := unsafe.SliceData(p)
		if len(iov) > 0 && start == end {
			iov[len(iov)-1].Len += uint64(len(p))
		} else {
			if len(iov) == maxIovecs {
				break
			}
			iov = append(iov, unix.Iovec{Base: start, Len: uint64(len(p))})
		}
		total += len(p)
		if total >= maxCopy {
			iov[len(iov)-1].Len -= uint64(total - maxCopy)
			break
		}
		end = nil
		if cap(p) > len(p) { // else one past the end may be another object
			end = unsafe.SliceData(p[len(p):cap(p)])
		}
	}
	l.sendIOV = iov
}

func (l *rawLink) doSend(fd uintptr) bool {
	n, errno := vectorCall(unix.SYS_WRITEV, fd, l.sendIOV)
	switch {
	case errno == unix.EAGAIN:
		if l.sendWait {
			return false
		}
		l.sendN, l.sendErr = 0, errWouldBlock
	case errno == unix.EINTR:
		return l.doSend(fd)
	case errno != 0:
		l.sendN, l.sendErr = 0, errno
	default:
		l.sendN, l.sendErr = n, nil
	}
	return true
}

func setIovec(v *unix.Iovec, p []byte) {
	v.Base, v.Len = unsafe.SliceData(p), uint64(len(p))
}

// vectorCall is readv or writev. The Go runtime ignores SIGPIPE for sockets: EPIPE comes back.
func vectorCall(trap, fd uintptr, iov []unix.Iovec) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall(trap, fd, uintptr(unsafe.Pointer(unsafe.SliceData(iov))), uintptr(len(iov)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}
