package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strconv"
	"strings"
	"time"
)

// initiator is an iSCSI session that keeps so many commands in flight: one goroutine that sends a command for each
// that is answered, as fio and the kernel do.
type initiator struct {
	conn net.Conn
	r    *bufio.Reader
	w    *bufio.Writer
	lun  byte

	maxSegment, firstBurst int // what the target takes
	noR2T, immediate       bool

	cmdSN, statSN uint32
	data          []byte // of writes
	scrap         []byte
}

// iSCSI's numbers that are needed here (RFC 7143).
const (
	bhs       = 48
	opNOPOut  = 0x40
	opCommand = 0x01
	opLogin   = 0x43
	opDataOut = 0x05
	opNOPIn   = 0x20
	opAnswer  = 0x21
	opDataIn  = 0x25
	opR2T     = 0x31
	noTag     = 0xffffffff
)

func connect(address, target string, lun byte) (*initiator, error) {
	c, err := net.DialTimeout("tcp", address, 10*time.Second)
	if err != nil {
		return nil, err
	}
	i := &initiator{conn: c, r: bufio.NewReaderSize(c, 1<<20), w: bufio.NewWriterSize(c, 1<<20), lun: lun, cmdSN: 1,
		data: make([]byte, 1<<20), scrap: make([]byte, 1<<20), maxSegment: 8192, firstBurst: 65536, immediate: true}
	r := rand.NewChaCha8([32]byte{1})
	r.Read(i.data)
	if err := i.login(target); err != nil {
		c.Close()
		return nil, fmt.Errorf("login to %s at %s: %w", target, address, err)
	}
	return i, i.ready()
}

func (i *initiator) login(target string) error {
	text := strings.Join([]string{"InitiatorName=iqn.2026-11.io.sheepdog:bench", "SessionType=Normal", "TargetName=" + target, "HeaderDigest=None", "DataDigest=None",
		"InitialR2T=No", "ImmediateData=Yes", "MaxRecvDataSegmentLength=262144", "MaxBurstLength=1048576", "FirstBurstLength=262144", "MaxOutstandingR2T=1",
		"ErrorRecoveryLevel=0", "MaxConnections=1"}, "\x00") + "\x00"
	b := make([]byte, bhs)
	b[0], b[1], b[8], b[13] = opLogin, 0x87, 0x80, 7
	binary.BigEndian.PutUint32(b[24:], i.cmdSN)
	if err := i.send(b, []byte(text)); err != nil {
		return err
	}
	h, data, err := i.receive()
	if err != nil {
		return err
	}
	if h[36] != 0 || h[1]&0x80 == 0 {
		return fmt.Errorf("status %x, flags %x", h[36:38], h[1])
	}
	for pair := range bytes.SplitSeq(data, []byte{0}) {
		key, value, _ := strings.Cut(string(pair), "=")
		n, _ := strconv.Atoi(value)
		switch key {
		case "MaxRecvDataSegmentLength":
			i.maxSegment = n
		case "FirstBurstLength":
			i.firstBurst = n
		case "InitialR2T":
			i.noR2T = value == "No"
		case "ImmediateData":
			i.immediate = value == "Yes"
		}
	}
	return nil
}

// ready takes the unit attentions that are there.
func (i *initiator) ready() error {
	for range 10 {
		i.command(1, make([]byte, 16), 0, 0)
		if err := i.w.Flush(); err != nil {
			return err
		}
		h, _, err := i.receive()
		if err != nil {
			return err
		}
		if h[0] == opAnswer && h[3] == 0 {
			return nil
		}
	}
	return fmt.Errorf("the unit does not become ready")
}

func (i *initiator) send(h, data []byte) error {
	h[5], h[6], h[7] = byte(len(data)>>16), byte(len(data)>>8), byte(len(data))
	i.w.Write(h)
	i.w.Write(data)
	i.w.Write(make([]byte, -len(data)&3))
	return i.w.Flush()
}

// receive takes a PDU; its data is valid until the next.
func (i *initiator) receive() (h [bhs]byte, data []byte, err error) {
	if _, err = io.ReadFull(i.r, h[:]); err != nil {
		return h, nil, err
	}
	n := int(h[5])<<16 | int(h[6])<<8 | int(h[7])
	if n > len(i.scrap)-4 {
		return h, nil, fmt.Errorf("a segment of %d bytes", n)
	}
	data = i.scrap[:(n+3)&^3]
	if _, err = io.ReadFull(i.r, data); err != nil {
		return h, nil, err
	}
	if op := h[0] & 0x3f; op == opAnswer || op == opDataIn && h[1]&1 != 0 {
		i.statSN = binary.BigEndian.Uint32(h[24:]) + 1
	}
	return h, data[:n], nil
}

// command queues a SCSI command that reads, or writes, n bytes.
func (i *initiator) command(tag uint32, cdb []byte, in, out int) {
	h := make([]byte, bhs)
	h[0], h[1], h[9] = opCommand, 0x80, i.lun
	now := 0
	switch {
	case in > 0:
		h[1] |= 0x40
	case out > 0:
		h[1] |= 0x20
		if i.immediate {
			now = min(out, i.firstBurst, i.maxSegment)
		}
		if i.noR2T && now < min(out, i.firstBurst) {
			h[1] &^= 0x80
		}
	}
	binary.BigEndian.PutUint32(h[16:], tag)
	binary.BigEndian.PutUint32(h[20:], uint32(in+out))
	binary.BigEndian.PutUint32(h[24:], i.cmdSN)
	binary.BigEndian.PutUint32(h[28:], i.statSN)
	i.cmdSN++
	copy(h[32:], cdb)
	h[5], h[6], h[7] = byte(now>>16), byte(now>>8), byte(now)
	i.w.Write(h)
	i.w.Write(i.data[:now])
	if h[1]&0x80 == 0 {
		i.dataOut(tag, noTag, now, min(out, i.firstBurst))
	}
}

// dataOut queues data from one offset to another.
func (i *initiator) dataOut(tag, transfer uint32, from, to int) {
	for sn := uint32(0); from < to; sn++ {
		n := min(to-from, i.maxSegment)
		h := make([]byte, bhs)
		h[0], h[9] = opDataOut, i.lun
		if from+n == to {
			h[1] = 0x80
		}
		h[5], h[6], h[7] = byte(n>>16), byte(n>>8), byte(n)
		binary.BigEndian.PutUint32(h[16:], tag)
		binary.BigEndian.PutUint32(h[20:], transfer)
		binary.BigEndian.PutUint32(h[28:], i.statSN)
		binary.BigEndian.PutUint32(h[36:], sn)
		binary.BigEndian.PutUint32(h[40:], uint32(from))
		i.w.Write(h)
		i.w.Write(i.data[from : from+n])
		from += n
	}
}

// job is what is done for a time, or with end until the volume's end.
type job struct {
	write, random bool
	block, depth  int
	size          int64 // of the volume, bytes
}

// run keeps depth commands in flight and returns how many were answered in which time.
func (i *initiator) run(ctx context.Context, j job, limit time.Duration) (ops int, took time.Duration, err error) {
	blocks := j.size / int64(j.block)
	next, cdb := int64(0), make([]byte, 16)
	issue := func(tag uint32) {
		at := next % blocks
		if j.random {
			at = rand.Int64N(blocks)
		}
		next++
		lba := at * int64(j.block) / 512
		if cdb[0] = 0x28; j.write {
			cdb[0] = 0x2a
		}
		binary.BigEndian.PutUint32(cdb[2:], uint32(lba))
		binary.BigEndian.PutUint16(cdb[7:], uint16(j.block/512))
		if j.write {
			i.command(tag, cdb, 0, j.block)
		} else {
			i.command(tag, cdb, j.block, 0)
		}
	}
	began := time.Now()
	more := func() bool {
		if limit == 0 {
			return next < blocks
		}
		return time.Since(began) < limit && ctx.Err() == nil
	}
	flight := 0
	for tag := uint32(1); flight < j.depth && more(); tag++ {
		issue(tag)
		flight++
	}
	for flight > 0 {
		if i.r.Buffered() < bhs {
			if err := i.w.Flush(); err != nil {
				return ops, 0, err
			}
		}
		h, _, err := i.receive()
		if err != nil {
			return ops, 0, err
		}
		tag := binary.BigEndian.Uint32(h[16:])
		switch op := h[0] & 0x3f; {
		case op == opR2T:
			off, n := int(binary.BigEndian.Uint32(h[40:])), int(binary.BigEndian.Uint32(h[44:]))
			i.dataOut(tag, binary.BigEndian.Uint32(h[20:]), off, off+n)
			continue
		case op == opNOPIn:
			if transfer := binary.BigEndian.Uint32(h[20:]); transfer != noTag {
				q := make([]byte, bhs)
				q[0], q[1] = opNOPOut, 0x80
				binary.BigEndian.PutUint32(q[16:], noTag)
				binary.BigEndian.PutUint32(q[20:], transfer)
				binary.BigEndian.PutUint32(q[24:], i.cmdSN)
				binary.BigEndian.PutUint32(q[28:], i.statSN)
				i.w.Write(q)
			}
			continue
		case op == opDataIn && h[1]&1 == 0:
			continue
		case op != opDataIn && op != opAnswer:
			return ops, 0, fmt.Errorf("opcode %#x", op)
		}
		if h[3] != 0 {
			return ops, 0, fmt.Errorf("status %#x", h[3])
		}
		ops++
		if flight--; more() {
			issue(tag)
			flight++
		}
	}
	return ops, time.Since(began), nil
}
