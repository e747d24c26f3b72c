// Package driver is a client of the native Sheepdog protocol that takes the steps of QEMU's
// driver: it keeps a copy of the map and trusts it, copies on write by it, opens again when
// it is told that a snapshot was taken, and reconnects and sends again for ever. It shares no code with
// the product.
package driver

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"
)

// Operations, flags and results, by their numbers on the wire.
const (
	opCreate  = 0x01
	OpRead    = 0x02
	OpWrite   = 0x03
	opDiscard = 0x05
	opNew     = 0x11
	opLock    = 0x12
	opRelease = 0x13
	opInfo    = 0x14
	opVDIs    = 0x15
	opFlush   = 0x16
	opDelete  = 0x17
	opDefault = 0x18

	FlagWrite  = 0x01
	FlagCow    = 0x02
	FlagCache  = 0x04
	FlagDirect = 0x08
	FlagShared = 0x20

	OK            = 0x00
	NoObject      = 0x02
	Exists        = 0x04
	InvalidParms  = 0x05
	NoVDI         = 0x08
	NoBaseVDI     = 0x09
	NoTag         = 0x0e
	NotLocked     = 0x10
	ReadOnly      = 0x1a
	Invalidated   = 0x1d
	headerSize    = 48
	inodeHeader   = 4664
	inodeSize     = inodeHeader + 4<<20
	inodeBit      = 1 << 63
	vmstateBit    = 1 << 62
	callTimeout   = 2 * time.Minute
	reconnectWait = 100 * time.Millisecond
)

// Result is what a request failed with.
type Result uint32

func (r Result) Error() string { return fmt.Sprintf("result %#x", uint32(r)) }

// Request is any request: fields that its operation does not have are 0.
type Request struct {
	Proto, Op uint8
	Flags     uint16
	Want      uint32 // bytes of data, without payload
	OID, Cow  uint64
	Offset    uint64
	VDISize   uint64
	Base      uint32
	Copies    uint8
	Shift     uint8
	SnapID    uint32
	Type      uint32
	Payload   []byte
}

// ofVDI reports which of the two forms the header has.
func (r *Request) ofVDI() bool { return r.Op >= opNew && r.Op != opFlush }

// Bytes encodes the request.
func (r *Request) Bytes(id uint32) []byte {
	return r.Append(make([]byte, 0, headerSize+len(r.Payload)), id)
}

// Append encodes the request behind what out holds.
func (r *Request) Append(out []byte, id uint32) []byte {
	out = append(out, make([]byte, headerSize)...)
	b := out[len(out)-headerSize:]
	le := binary.LittleEndian
	b[0], b[1] = r.Proto, r.Op
	le.PutUint16(b[2:], r.Flags)
	le.PutUint32(b[8:], id)
	le.PutUint32(b[12:], r.Want)
	if r.Flags&FlagWrite != 0 {
		le.PutUint32(b[12:], uint32(len(r.Payload)))
	}
	if r.ofVDI() {
		le.PutUint64(b[16:], r.VDISize)
		le.PutUint32(b[24:], r.Base)
		b[28], b[31] = r.Copies, r.Shift
		le.PutUint32(b[32:], r.SnapID)
		le.PutUint32(b[36:], r.Type)
	} else {
		le.PutUint64(b[16:], r.OID)
		le.PutUint64(b[24:], r.Cow)
		b[32] = r.Copies
		le.PutUint64(b[40:], r.Offset)
	}
	return append(out, r.Payload...)
}

// Response is the header of a response, and its data.
type Response struct {
	Header [headerSize]byte
	Data   []byte
}

// Result is nil for success.
func (r *Response) Err() error {
	if n := binary.LittleEndian.Uint32(r.Header[16:]); n != OK {
		return Result(n)
	}
	return nil
}

// VID is that of a response to a VDI operation.
func (r *Response) VID() uint32 { return binary.LittleEndian.Uint32(r.Header[24:]) }

// Conn is a connection on which many requests may be under way.
type Conn struct {
	conn net.Conn

	mu      sync.Mutex
	last    uint32
	waiting map[uint32]chan *Response
	broken  error
}

// Dial connects to HOST:PORT, or to a path.
func Dial(address string) (*Conn, error) {
	network := "tcp"
	if strings.HasPrefix(address, "/") {
		network = "unix"
	}
	conn, err := net.DialTimeout(network, address, 5*time.Second)
	if err != nil {
		return nil, err
	}
	c := &Conn{conn: conn, waiting: map[uint32]chan *Response{}}
	go c.receive()
	return c, nil
}

func (c *Conn) receive() {
	for {
		r := new(Response)
		_, err := io.ReadFull(c.conn, r.Header[:])
		if err == nil {
			r.Data = make([]byte, binary.LittleEndian.Uint32(r.Header[12:]))
			_, err = io.ReadFull(c.conn, r.Data)
		}
		c.mu.Lock()
		if err != nil {
			c.broken = err
			for _, w := range c.waiting {
				close(w)
			}
			c.waiting = nil
			c.mu.Unlock()
			return
		}
		id := binary.LittleEndian.Uint32(r.Header[8:])
		w := c.waiting[id]
		delete(c.waiting, id)
		c.mu.Unlock()
		if w != nil {
			w <- r
		}
	}
}

// Call sends a request and waits for its response. An error says that the connection is lost.
func (c *Conn) Call(r Request) (*Response, error) {
	w := make(chan *Response, 1)
	c.mu.Lock()
	if c.broken != nil {
		c.mu.Unlock()
		return nil, c.broken
	}
	c.last++
	c.waiting[c.last] = w
	b := r.Bytes(c.last)
	_, err := c.conn.Write(b)
	c.mu.Unlock()
	if err != nil {
		return nil, err
	}
	select {
	case got, ok := <-w:
		if !ok {
			return nil, fmt.Errorf("operation %#x is not answered: connection is lost: %w", r.Op, c.lost())
		}
		return got, nil
	case <-time.After(callTimeout):
		return nil, fmt.Errorf("operation %#x is not answered within %v", r.Op, callTimeout)
	}
}

// lost is why the connection is.
func (c *Conn) lost() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.broken
}

// Close closes the connection, as a killed client does.
func (c *Conn) Close() { c.conn.Close() }

// Once is one request on a connection of its own, as QEMU makes for all but data. The result
// of the operation is the error.
func Once(address string, r Request) (*Response, error) {
	c, err := Dial(address)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	got, err := c.Call(r)
	if err != nil {
		return nil, err
	}
	return got, got.Err()
}

func names(name, tag string) []byte {
	b := make([]byte, 512)
	copy(b, name)
	copy(b[256:], tag)
	return b
}
