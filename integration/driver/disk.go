package driver

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"sync"
	"time"
)

// Disk is an open VDI or snapshot. Requests that touch one object are serialised, as QEMU does.
type Disk struct {
	Address string
	Name    string
	Cache   uint16 // FlagCache or FlagDirect
	Reloads int    // how often it was told that a snapshot was taken

	conn     *Conn
	snapshot bool
	header   []byte   // of the inode
	entries  []uint32 // its copy of the map

	mu      sync.Mutex
	objects map[uint32]*sync.Mutex
}

// Create makes a VDI. Shift 0 stands for the cluster's object size.
func Create(address, name string, size uint64, shift, copies uint8) error {
	if shift == 0 {
		d, err := Once(address, Request{Proto: 1, Op: opDefault})
		if err != nil {
			return err
		}
		shift = d.Header[22]
	}
	_, err := Once(address, Request{Op: opNew, Flags: FlagWrite, VDISize: size, Shift: shift, Copies: copies, Payload: names(name, "")[:256]})
	return err
}

// Clone makes a VDI of a snapshot.
func Clone(address, name, tag, clone string, size uint64) error {
	r, err := Once(address, Request{Proto: 1, Op: opLock, Flags: FlagWrite, Payload: names(name, tag)})
	if err != nil {
		return err
	}
	_, err = Once(address, Request{Op: opNew, Flags: FlagWrite, VDISize: size, Base: r.VID(), Shift: 22, Payload: names(clone, "")[:256]})
	return err
}

// Delete deletes a VDI, or with a tag a snapshot.
func Delete(address, name, tag string) error {
	payload := names(name, tag)
	if tag == "" {
		payload = payload[:256]
	}
	_, err := Once(address, Request{Op: opDelete, Flags: FlagWrite, Payload: payload})
	return err
}

// Open opens a VDI, or with a tag a snapshot.
func Open(address, name, tag string, cache uint16) (*Disk, error) {
	d := &Disk{Address: address, Name: name, Cache: cache, snapshot: tag != "", objects: map[uint32]*sync.Mutex{}}
	var err error
	if d.conn, err = Dial(address); err != nil {
		return nil, err
	}
	r, err := Once(address, Request{Proto: 1, Op: opLock, Flags: FlagWrite, Payload: names(name, tag)})
	if err == nil {
		err = d.readInode(r.VID())
	}
	if err != nil {
		d.conn.Close()
		return nil, err
	}
	return d, nil
}

func (d *Disk) readInode(vid uint32) error {
	r, err := Once(d.Address, Request{Op: OpRead, Flags: d.Cache, OID: inodeOf(vid), Want: inodeSize})
	if err != nil {
		return err
	}
	if len(r.Data) != inodeSize {
		return fmt.Errorf("inode has %d bytes", len(r.Data))
	}
	d.header = r.Data[:inodeHeader]
	d.entries = make([]uint32, 1<<20)
	for i := range d.entries {
		d.entries[i] = binary.LittleEndian.Uint32(r.Data[inodeHeader+4*i:])
	}
	return nil
}

func inodeOf(vid uint32) uint64 { return inodeBit | uint64(vid)<<32 }

func object(vid, index uint32) uint64 { return uint64(vid)<<32 | uint64(index) }

func (d *Disk) field(off int) uint64 { return binary.LittleEndian.Uint64(d.header[off:]) }

// Size is the size in bytes as the disk knows it.
func (d *Disk) Size() uint64 { return d.field(536) }

// ObjectSize is in bytes.
func (d *Disk) ObjectSize() int { return 1 << d.header[555] }

// Copies is how many copies are kept; requests for data objects must say it: there are servers that write that many.
func (d *Disk) Copies() uint8 { return d.header[554] }

// VID is the working vid as the disk knows it.
func (d *Disk) VID() uint32 { return binary.LittleEndian.Uint32(d.header[560:]) }

// Parent is the vid of the snapshot that it began as.
func (d *Disk) Parent() uint32 { return binary.LittleEndian.Uint32(d.header[564:]) }

// Entry is the disk's copy of a map entry.
func (d *Disk) Entry(i int) uint32 { return d.entries[i] }

// reload reads the header of what the VDI is now, and keeps the map.
func (d *Disk) reload(tag string) error {
	r, err := Once(d.Address, Request{Proto: 1, Op: opInfo, Flags: FlagWrite, Payload: names(d.Name, tag)})
	if err != nil {
		return err
	}
	h, err := Once(d.Address, Request{Op: OpRead, Flags: d.Cache, OID: inodeOf(r.VID()), Want: inodeHeader})
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if r.VID() != d.VID() {
		d.header = h.Data
		d.Reloads++
	}
	return nil
}

// call sends a request, and sends it again on a new connection when that is lost.
func (d *Disk) call(r Request) (*Response, error) {
	for {
		d.mu.Lock()
		c := d.conn
		d.mu.Unlock()
		got, err := c.Call(r)
		if err == nil {
			return got, got.Err()
		}
		d.reconnect(c)
	}
}

func (d *Disk) reconnect(lost *Conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.conn != lost {
		return
	}
	lost.Close()
	for {
		c, err := Dial(d.Address)
		if err == nil {
			d.conn = c
			return
		}
		time.Sleep(reconnectWait)
	}
}

// lock serialises requests for an object.
func (d *Disk) lock(index uint32) func() {
	d.mu.Lock()
	m := d.objects[index]
	if m == nil {
		m = new(sync.Mutex)
		d.objects[index] = m
	}
	d.mu.Unlock()
	m.Lock()
	return m.Unlock
}

func (d *Disk) each(p []byte, off uint64, do func(index uint32, at uint64, p []byte) error) error {
	size := uint64(d.ObjectSize())
	for len(p) > 0 {
		at := off % size
		n := min(uint64(len(p)), size-at)
		index := uint32(off / size)
		unlock := d.lock(index)
		err := do(index, at, p[:n])
		unlock()
		if err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// Read fills p. Holes are zeros, and nothing is sent for them.
func (d *Disk) Read(p []byte, off uint64) error {
	return d.each(p, off, func(index uint32, at uint64, p []byte) error {
		d.mu.Lock()
		vid := d.entries[index]
		d.mu.Unlock()
		if vid == 0 {
			clear(p)
			return nil
		}
		r, err := d.call(Request{Op: OpRead, Flags: d.Cache, OID: object(vid, index), Offset: at, Want: uint32(len(p)), Copies: d.Copies()})
		if err != nil {
			return fmt.Errorf("read object %x of index %d: %w", vid, index, err)
		}
		if copy(p, r.Data) != len(p) || len(r.Data) != len(p) {
			return fmt.Errorf("read of %d bytes is answered with %d", len(p), len(r.Data))
		}
		return nil
	})
}

// Write stores p; on a snapshot it makes a working VDI of it first.
func (d *Disk) Write(p []byte, off uint64) error {
	if d.snapshot {
		if err := d.branch(); err != nil {
			return err
		}
	}
	return d.each(p, off, func(index uint32, at uint64, p []byte) error {
		created, err := d.writeObject(index, at, p)
		if err != nil || !created {
			return err
		}
		return d.writeEntries(index, index)
	})
}

func (d *Disk) writeObject(index uint32, at uint64, p []byte) (created bool, err error) {
	for {
		d.mu.Lock()
		mine, vid := d.VID(), d.entries[index]
		d.mu.Unlock()
		r := Request{Op: OpWrite, Flags: FlagWrite | d.Cache, OID: object(mine, index), Offset: at, Payload: p, Copies: d.Copies()}
		if vid != mine {
			r.Op = opCreate
			if vid != 0 {
				r.Cow, r.Flags = object(vid, index), r.Flags|FlagCow
			}
		}
		if _, err = d.call(r); errors.Is(err, Result(ReadOnly)) {
			if err = d.reload(""); err == nil {
				continue
			}
		}
		if err != nil {
			return false, fmt.Errorf("write object %x of index %d: %w", mine, index, err)
		}
		if r.Op == opCreate {
			d.mu.Lock()
			d.entries[index] = mine
			d.mu.Unlock()
		}
		return r.Op == opCreate, nil
	}
}

// writeEntries writes a range of the map.
func (d *Disk) writeEntries(first, last uint32) error {
	for {
		d.mu.Lock()
		mine := d.VID()
		var p []byte
		for i := first; i <= last; i++ {
			p = binary.LittleEndian.AppendUint32(p, d.entries[i])
		}
		d.mu.Unlock()
		_, err := d.call(Request{Op: OpWrite, Flags: FlagWrite | d.Cache, OID: inodeOf(mine), Offset: inodeHeader + 4*uint64(first), Payload: p})
		if errors.Is(err, Result(ReadOnly)) {
			if err = d.reload(""); err == nil {
				continue
			}
		}
		return err
	}
}

// Discard gives whole objects back.
func (d *Disk) Discard(off, n uint64) error {
	size := uint64(d.ObjectSize())
	for i := (off + size - 1) / size; (i+1)*size <= off+n; i++ {
		unlock := d.lock(uint32(i))
		d.mu.Lock()
		had := d.entries[i] != 0
		d.entries[i] = 0
		d.mu.Unlock()
		var err error
		if had {
			err = d.writeEntries(uint32(i), uint32(i))
		}
		unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

// Flush makes durable what was answered. In direct mode there is nothing to do.
func (d *Disk) Flush() error {
	if d.Cache != FlagCache {
		return nil
	}
	_, err := d.call(Request{Op: opFlush, Flags: d.Cache, OID: inodeOf(d.VID())})
	return err
}

func (d *Disk) writeHeader() error {
	_, err := Once(d.Address, Request{Op: OpWrite, Flags: FlagWrite | d.Cache, OID: inodeOf(d.VID()), Payload: d.header})
	return err
}

// Grow changes the size.
func (d *Disk) Grow(size uint64) error {
	binary.LittleEndian.PutUint64(d.header[536:], size)
	return d.writeHeader()
}

// SaveState stores the state of the machine, which the next snapshot has.
func (d *Disk) SaveState(p []byte) error { return d.SaveStateFrom(0, p) }

// SaveStateFrom stores what a state has from there on.
func (d *Disk) SaveStateFrom(pos int, p []byte) error {
	size := d.ObjectSize()
	const piece = 96 << 10
	for pos < len(p) {
		n := min(len(p)-pos, piece, size-pos%size)
		r := Request{Op: OpWrite, Flags: FlagWrite | d.Cache, OID: vmstateBit | object(d.VID(), uint32(pos/size)), Offset: uint64(pos % size), Payload: p[pos : pos+n]}
		if r.Offset == 0 {
			r.Op = opCreate
		}
		if _, err := Once(d.Address, r); err != nil {
			return err
		}
		pos += n
	}
	return nil
}

// LoadState reads the state of the snapshot that the VDI was made of.
func (d *Disk) LoadState(p []byte) error {
	size := d.ObjectSize()
	for pos := 0; pos < len(p); {
		n := min(len(p)-pos, size-pos%size)
		r, err := Once(d.Address, Request{Op: OpRead, Flags: d.Cache, OID: vmstateBit | object(d.Parent(), uint32(pos/size)), Offset: uint64(pos % size), Want: uint32(n)})
		if err != nil {
			return err
		}
		copy(p[pos:], r.Data)
		pos += n
	}
	return nil
}

// Snapshot takes a snapshot.
func (d *Disk) Snapshot(tag string, stateSize, clock uint64) error {
	clear(d.header[256:512])
	copy(d.header[256:], tag)
	binary.LittleEndian.PutUint64(d.header[528:], clock)
	binary.LittleEndian.PutUint64(d.header[544:], stateSize)
	if err := d.writeHeader(); err != nil {
		return err
	}
	vid, err := d.newVDI(1)
	if err != nil {
		return err
	}
	h, err := Once(d.Address, Request{Op: OpRead, Flags: d.Cache, OID: inodeOf(vid), Want: inodeHeader})
	if err != nil {
		return err
	}
	d.header = h.Data
	return nil
}

func (d *Disk) newVDI(snapID uint32) (uint32, error) {
	r, err := Once(d.Address, Request{
		Op: opNew, Flags: FlagWrite, Base: d.VID(), SnapID: snapID, VDISize: d.Size(), Copies: d.header[554], Shift: d.header[555], Payload: names(d.Name, "")[:256],
	})
	if err != nil {
		return 0, err
	}
	return r.VID(), nil
}

// branch makes what the disk is, which is a snapshot, the working VDI.
func (d *Disk) branch() error {
	_, err := Once(d.Address, Request{Op: opDelete, Flags: FlagWrite, Base: d.VID(), Payload: names(d.Name, "")[:256]})
	if err != nil && !errors.Is(err, Result(NoVDI)) {
		return err
	}
	vid, err := d.newVDI(0)
	if err == nil {
		err = d.readInode(vid)
	}
	if err == nil {
		d.snapshot = false
	}
	return err
}

// Goto goes back to a snapshot.
func (d *Disk) Goto(tag string) error {
	if err := d.reload(tag); err != nil {
		return err
	}
	return d.branch()
}

// Snapshots lists the tags and sizes of states of the VDI's snapshots, as clients find them.
func (d *Disk) Snapshots() (tags []string, states []uint64, err error) {
	r, err := Once(d.Address, Request{Op: opVDIs, Want: 1 << 21})
	if err != nil {
		return nil, nil, err
	}
	h := fnv.New64a()
	h.Write([]byte(d.Name))
	for vid := uint32(h.Sum64()) & (1<<24 - 1); r.Data[vid/8]>>(vid%8)&1 != 0; vid = (vid + 1) % (1 << 24) {
		in, err := Once(d.Address, Request{Op: OpRead, OID: inodeOf(vid), Want: inodeHeader})
		if err != nil {
			return nil, nil, fmt.Errorf("read the header of %x: %w", vid, err)
		}
		name, _, _ := bytes.Cut(in.Data[:256], []byte{0})
		tag, _, _ := bytes.Cut(in.Data[256:512], []byte{0})
		if string(name) == d.Name && binary.LittleEndian.Uint64(in.Data[520:]) != 0 {
			tags = append(tags, string(tag))
			states = append(states, binary.LittleEndian.Uint64(in.Data[544:]))
		}
	}
	return tags, states, nil
}

// ClearMap does what "qemu-img snapshot -d" does to the open VDI before it deletes the snapshot:
// it clears the map, up to 128 entries at a time.
func (d *Disk) ClearMap() error {
	count := int((d.Size() + uint64(d.ObjectSize()) - 1) / uint64(d.ObjectSize()))
	c, err := Dial(d.Address)
	if err != nil {
		return err
	}
	defer c.Close()
	for i := 0; i < count; {
		for i < count && d.entries[i] == 0 {
			i++
		}
		start, filled := i, 0
		for i < count && filled < 128 {
			if d.entries[i] != 0 {
				d.entries[i] = 0
				filled++
			}
			i++
		}
		r, err := c.Call(Request{Op: OpWrite, Flags: FlagWrite | d.Cache, OID: inodeOf(d.VID()), Offset: inodeHeader + 4*uint64(start), Payload: make([]byte, 4*(i-start))})
		if err == nil {
			err = r.Err()
		}
		if err != nil && i > start {
			return err
		}
	}
	return nil
}

// Close releases the VDI.
func (d *Disk) Close() error {
	_, err := Once(d.Address, Request{Op: opRelease, Flags: FlagWrite, Base: d.VID(), Payload: append([]byte(d.Name), 0)})
	d.conn.Close()
	if errors.Is(err, Result(NotLocked)) {
		return nil
	}
	return err
}

// Kill ends the client as kill -9 does.
func (d *Disk) Kill() { d.conn.Close() }
