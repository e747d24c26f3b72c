// Package client is a small NBD client for tests: many requests in flight on one connection, and raw
// access to the bytes for those tests that misbehave. It speaks the plain part of the protocol (fixed
// newstyle, NBD_OPT_GO, simple replies): the rest is tested with other people's clients.
package client

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Numbers of the protocol that the tests use, named as in the specification.
const (
	Magic         = 0x4e42444d41474943 // "NBDMAGIC"
	OptionMagic   = 0x49484156454f5054 // "IHAVEOPT"
	OptReplyMagic = 0x3e889045565a9
	RequestMagic  = 0x25609513
	SimpleReply   = 0x67446698

	OptExportName = 1
	OptAbort      = 2
	OptList       = 3
	OptInfo       = 6
	OptGo         = 7

	RepAck       = 1
	RepInfo      = 3
	RepErrUnsup  = 1<<31 | 1
	RepErrUnknow = 1<<31 | 6

	CmdRead        = 0
	CmdWrite       = 1
	CmdDisc        = 2
	CmdFlush       = 3
	CmdTrim        = 4
	CmdWriteZeroes = 6

	FlagFUA    = 1 << 0
	FlagNoHole = 1 << 1
)

// Errno is the error number of a reply.
type Errno uint32

// Error numbers of the protocol.
const (
	EPERM     Errno = 1
	EIO       Errno = 5
	EINVAL    Errno = 22
	ENOSPC    Errno = 28
	ESHUTDOWN Errno = 108
)

// Error implements error.
func (e Errno) Error() string { return fmt.Sprintf("NBD error %d", uint32(e)) }

// ErrGone is the result of every request whose connection ended before its reply.
var ErrGone = errors.New("connection ended")

// Conn is one connection in transmission. All methods may be called concurrently.
type Conn struct {
	Size  uint64 // bytes
	Flags uint16 // transmission flags

	conn net.Conn

	sending sync.Mutex // held for a whole request on the wire

	mu     sync.Mutex
	cookie uint64
	wait   map[uint64]*pending
	gone   bool
}

type pending struct {
	data  []byte // read replies are put here
	reply chan error
}

// Dial connects to "tcp" HOST:PORT or "unix" PATH and opens an export.
func Dial(network, address, export string) (*Conn, error) {
	c, err := dial(network, address, export)
	if err != nil {
		return nil, err
	}
	go c.receive()
	return c, nil
}

// DialRaw is Dial for who sends requests and takes simple replies by himself. size is the export's, in bytes.
func DialRaw(network, address, export string) (conn net.Conn, size uint64, err error) {
	c, err := dial(network, address, export)
	if err != nil {
		return nil, 0, err
	}
	return c.conn, c.Size, nil
}

func dial(network, address, export string) (*Conn, error) {
	conn, err := net.DialTimeout(network, address, 10*time.Second)
	if err != nil {
		return nil, err
	}
	c := &Conn{conn: conn, wait: map[uint64]*pending{}}
	if err := c.handshake(export); err != nil {
		conn.Close()
		return nil, fmt.Errorf("open export %q: %w", export, err)
	}
	return c, nil
}

// Greet does the first exchange on a raw connection: everything up to the first option.
func Greet(conn net.Conn) error {
	var hello [18]byte
	if _, err := io.ReadFull(conn, hello[:]); err != nil {
		return fmt.Errorf("read greeting: %w", err)
	}
	if binary.BigEndian.Uint64(hello[:]) != Magic || binary.BigEndian.Uint64(hello[8:]) != OptionMagic {
		return errors.New("not an NBD server")
	}
	_, err := conn.Write([]byte{0, 0, 0, 3}) // fixed newstyle, no zeroes
	return err
}

// Option encodes an option with its header.
func Option(option uint32, payload []byte) []byte {
	b := binary.BigEndian.AppendUint64(nil, OptionMagic)
	b = binary.BigEndian.AppendUint32(b, option)
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	return append(b, payload...)
}

// GoPayload is the payload of NBD_OPT_GO and NBD_OPT_INFO without information requests.
func GoPayload(export string) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(export)))
	b = append(b, export...)
	return append(b, 0, 0)
}

// OptionReply reads one reply to an option.
func OptionReply(r io.Reader) (option, kind uint32, payload []byte, err error) {
	var h [20]byte
	if _, err = io.ReadFull(r, h[:]); err != nil {
		return 0, 0, nil, err
	}
	if binary.BigEndian.Uint64(h[:]) != OptReplyMagic {
		return 0, 0, nil, errors.New("option reply without magic")
	}
	n := binary.BigEndian.Uint32(h[16:])
	if n > 1<<20 {
		return 0, 0, nil, fmt.Errorf("option reply of %d bytes", n)
	}
	payload = make([]byte, n)
	_, err = io.ReadFull(r, payload)
	return binary.BigEndian.Uint32(h[8:]), binary.BigEndian.Uint32(h[12:]), payload, err
}

func (c *Conn) handshake(export string) error {
	c.conn.SetDeadline(time.Now().Add(30 * time.Second))
	defer c.conn.SetDeadline(time.Time{})
	if err := Greet(c.conn); err != nil {
		return err
	}
	if _, err := c.conn.Write(Option(OptGo, GoPayload(export))); err != nil {
		return err
	}
	for {
		_, kind, payload, err := OptionReply(c.conn)
		switch {
		case err != nil:
			return err
		case kind == RepAck:
			return nil
		case kind&(1<<31) != 0:
			return fmt.Errorf("refused with %#x: %s", kind, payload)
		case kind == RepInfo && len(payload) == 12 && binary.BigEndian.Uint16(payload) == 0:
			c.Size = binary.BigEndian.Uint64(payload[2:])
			c.Flags = binary.BigEndian.Uint16(payload[10:])
		}
	}
}

// receive hands replies to whoever waits for them until the connection ends.
func (c *Conn) receive() {
	r := bufio.NewReaderSize(c.conn, 256<<10)
	for c.receiveOne(r) == nil {
	}
	c.conn.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.gone = true
	for cookie, p := range c.wait {
		delete(c.wait, cookie)
		p.reply <- ErrGone
	}
}

func (c *Conn) receiveOne(r io.Reader) error {
	var h [16]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return err
	}
	if binary.BigEndian.Uint32(h[:]) != SimpleReply {
		return errors.New("reply without magic")
	}
	cookie := binary.BigEndian.Uint64(h[8:])
	c.mu.Lock()
	p := c.wait[cookie]
	c.mu.Unlock()
	if p == nil {
		return errors.New("reply to no request")
	}
	var result error
	if e := Errno(binary.BigEndian.Uint32(h[4:])); e != 0 {
		result = e
	} else if p.data != nil {
		if _, err := io.ReadFull(r, p.data); err != nil {
			return err
		}
	}
	c.mu.Lock()
	delete(c.wait, cookie)
	c.mu.Unlock()
	p.reply <- result
	return nil
}

// Start sends a request and returns where its result will come: nil, an Errno or ErrGone. For a
// write data is sent before Start returns; for a read it is filled in before the result comes.
func (c *Conn) Start(command, flags uint16, off uint64, length uint32, data []byte) <-chan error {
	p := &pending{reply: make(chan error, 1)}
	if command == CmdRead {
		p.data = data
	}
	c.sending.Lock()
	defer c.sending.Unlock()
	c.mu.Lock()
	if c.gone {
		c.mu.Unlock()
		p.reply <- ErrGone
		return p.reply
	}
	c.cookie++
	cookie := c.cookie
	c.wait[cookie] = p
	c.mu.Unlock()
	b := Request(command, flags, cookie, off, length)
	if command == CmdWrite {
		b = append(b, data[:length]...)
	}
	if _, err := c.conn.Write(b); err != nil {
		c.conn.Close() // receive answers everything that waits
	}
	return p.reply
}

// Request encodes a request's header.
func Request(command, flags uint16, cookie, off uint64, length uint32) []byte {
	b := binary.BigEndian.AppendUint32(make([]byte, 0, 28), RequestMagic)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, command)
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, off)
	return binary.BigEndian.AppendUint32(b, length)
}

// Read fills p from off.
func (c *Conn) Read(p []byte, off uint64) error {
	return <-c.Start(CmdRead, 0, off, uint32(len(p)), p)
}

// Write stores p at off.
func (c *Conn) Write(p []byte, off uint64, flags uint16) error {
	return <-c.Start(CmdWrite, flags, off, uint32(len(p)), p)
}

// Zero makes n bytes at off read as zero.
func (c *Conn) Zero(off uint64, n uint32, flags uint16) error {
	return <-c.Start(CmdWriteZeroes, flags, off, n, nil)
}

// Trim discards n bytes at off.
func (c *Conn) Trim(off uint64, n uint32) error {
	return <-c.Start(CmdTrim, 0, off, n, nil)
}

// Flush makes everything written and answered before durable.
func (c *Conn) Flush() error { return <-c.Start(CmdFlush, 0, 0, 0, nil) }

// Close says goodbye and ends the connection.
func (c *Conn) Close() {
	c.sending.Lock()
	c.conn.SetWriteDeadline(time.Now().Add(time.Second))
	c.conn.Write(Request(CmdDisc, 0, 0, 0, 0))
	c.sending.Unlock()
	c.conn.Close()
}
