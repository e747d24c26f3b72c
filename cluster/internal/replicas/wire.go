package replicas

import (
	"encoding/binary"
	"errors"
	"fmt"

	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

// Operations between nodes. Their numbers travel; those from 64 on are not of this package.
const (
	opAct       uint16 = 1  // a gateway's request, for the primary. Data
	opChange    uint16 = 2  // a change, for a member or learner. Commit
	opCommitted uint16 = 3  // marks of many partitions. Commit
	opSurvey    uint16 = 4  // Commit
	opSync      uint16 = 5  // Commit
	opAsk       uint16 = 6  // Bulk
	opRepair    uint16 = 7  // have an object like the primary's. Bulk, and Commit to settle
	opSums      uint16 = 8  // what an object is like. Bulk
	opBlocks    uint16 = 9  // content of an object, with checksums. Bulk
	opSpace     uint16 = 10 // for which partitions is there little space left, or no disk. Commit
	opCheck     uint16 = 11 // compare all replicas of a partition, as its primary. Session 1: repair. Reply: Checked in JSON. Bulk
	opHave      uint16 = 12 // which objects of a partition are there. Bulk
	lastOp      uint16 = 63
)

// flagTight, in the first byte of the head of the reply to opChange: little space is left
// for the partition.
const flagTight = 1

// Errors are the failures that travel beside those that package peer knows.
var Errors = map[uint16]error{
	peer.FirstErrorCode:     replica.ErrRetry,
	peer.FirstErrorCode + 1: replica.ErrEpoch,
	peer.FirstErrorCode + 2: replica.ErrBusy,
	peer.FirstErrorCode + 3: errNotKept,
}

// errDamaged: data is not what its sender says that it sent. It is sent again.
var errDamaged = fmt.Errorf("%w: data was damaged on the way", replica.ErrRetry)

// errMessage: the head of a message is not what its operation has.
var errMessage = fmt.Errorf("%w: message is not well formed", object.ErrInvalid)

var le = binary.LittleEndian

// route is what all messages about a partition begin with.
type route struct {
	group object.Group
	epoch state.Epoch
	to    uint64 // incarnation of the node that it is for
}

func (m *route) append(b []byte) []byte {
	b = append(b, byte(m.group.Policy))
	b = le.AppendUint16(b, uint16(m.group.Partition))
	b = le.AppendUint64(b, uint64(m.epoch))
	return le.AppendUint64(b, m.to)
}

func (m *route) decode(d *decoder) {
	m.group = object.Group{Policy: object.PolicyID(d.u8()), Partition: object.Partition(d.u16())}
	m.epoch, m.to = state.Epoch(d.u64()), d.u64()
}

// appendGroups and decodeGroups bring a list of partitions.
func appendGroups(b []byte, list []object.Group) []byte {
	for _, g := range list {
		b = le.AppendUint16(append(b, byte(g.Policy)), uint16(g.Partition))
	}
	return b
}

func decodeGroups(b []byte) (map[object.Group]bool, error) {
	list := make(map[object.Group]bool, len(b)/3)
	d := decoder{b: b}
	for len(d.b) > 0 {
		list[object.Group{Policy: object.PolicyID(d.u8()), Partition: object.Partition(d.u16())}] = true
	}
	return list, d.end()
}

// action is what is done to an object.
type action struct {
	verb  Verb
	flags object.Flags
	shift uint8
	id    object.ID
	off   uint32
	len   uint32
	sum   uint64 // of the data that is written, see content; else 0
}

func (m *action) append(b []byte) []byte {
	b = append(b, byte(m.verb), byte(m.flags), m.shift)
	b = le.AppendUint64(b, uint64(m.id))
	b = le.AppendUint32(le.AppendUint32(b, m.off), m.len)
	return le.AppendUint64(b, m.sum)
}

func (m *action) decode(d *decoder) {
	m.verb, m.flags, m.shift = Verb(d.u8()), object.Flags(d.u8()), d.u8()
	m.id, m.off, m.len, m.sum = object.ID(d.u64()), d.u32(), d.u32(), d.u64()
}

// act is the head of opAct. keeps is the number under which the sender keeps the data of a write, so
// that it need not be sent back to it; 0: it does not. Its reply's head has the holders of a change, or the xxh3 of
// what was read.
type act struct {
	route
	action
	volume     object.VID
	generation uint64
	keeps      uint64
}

func (m *act) append(b []byte) []byte {
	b = m.action.append(m.route.append(b))
	b = le.AppendUint32(b, uint32(m.volume))
	return le.AppendUint64(le.AppendUint64(b, m.generation), m.keeps)
}

func decodeAct(head []byte) (m act, err error) {
	d := decoder{b: head}
	m.route.decode(&d)
	m.action.decode(&d)
	m.volume, m.generation, m.keeps = object.VID(d.u32()), d.u64(), d.u64()
	return m, d.end()
}

// change is the head of opChange, and with version 0 that of opRepair. kept: the data does not
// follow, it is that of the write which the receiver keeps under this number.
type change struct {
	route
	session uint32
	version object.Version
	mark    replica.Mark
	action
	kept uint64
}

func (m *change) append(b []byte) []byte {
	b = m.route.append(b)
	b = le.AppendUint32(b, m.session)
	b = appendVersion(appendVersion(b, m.version), m.mark)
	return le.AppendUint64(m.action.append(b), m.kept)
}

func decodeChange(head []byte) (m change, err error) {
	d := decoder{b: head}
	m.route.decode(&d)
	m.session = d.u32()
	m.version, m.mark = d.version(), d.version()
	m.action.decode(&d)
	m.kept = d.u64()
	return m, d.end()
}

// maxHead is more than any head of this package takes, but those of opCommitted.
const maxHead = 128

// question is the head of opSurvey, opAsk and opSync.
type question struct {
	route
	session uint32
}

func (m *question) append(b []byte) []byte {
	return le.AppendUint32(m.route.append(b), m.session)
}

func decodeQuestion(head []byte) (m question, err error) {
	d := decoder{b: head}
	m.route.decode(&d)
	m.session = d.u32()
	return m, d.end()
}

// pull is the head of opSums and opBlocks.
type pull struct {
	route
	id       object.ID
	off, len uint32
}

func (m *pull) append(b []byte) []byte {
	b = le.AppendUint64(m.route.append(b), uint64(m.id))
	return le.AppendUint32(le.AppendUint32(b, m.off), m.len)
}

func decodePull(head []byte) (m pull, err error) {
	d := decoder{b: head}
	m.route.decode(&d)
	m.id, m.off, m.len = object.ID(d.u64()), d.u32(), d.u32()
	return m, d.end()
}

// committed is an entry of opCommitted.
type committed struct {
	route
	mark replica.Mark
}

// appendInfo and decodeInfo bring what is known about an object. The partition is known.
func appendInfo(b []byte, i object.Info) []byte {
	b = le.AppendUint64(b, uint64(i.Key.ID))
	b = appendVersion(append(b, i.SizeShift), i.Version)
	return le.AppendUint64(b, i.Allocated)
}

func (d *decoder) info(g object.Group) object.Info {
	i := object.Info{Key: object.Key{Group: g, ID: object.ID(d.u64())}, SizeShift: d.u8()}
	i.Version, i.Allocated = d.version(), d.u64()
	return i
}

// Holders travel in the head of a reply.
func appendPeers(b []byte, list []replica.Peer) []byte {
	for _, m := range list {
		b = le.AppendUint64(le.AppendUint16(b, uint16(m.Node)), m.Incarnation)
	}
	return b
}

func decodePeers(to []replica.Peer, b []byte) ([]replica.Peer, error) {
	d := decoder{b: b}
	for len(d.b) > 0 {
		to = append(to, replica.Peer{Node: state.NodeID(d.u16()), Incarnation: d.u64()})
	}
	return to, d.end()
}

// A report with the list of all objects, if wanted.
func appendReport(b []byte, r replica.Report, have []object.ID) []byte {
	b = appendVersion(b, r.Mark)
	b = le.AppendUint32(b, uint32(len(r.Recent)))
	for _, id := range r.Recent {
		b = le.AppendUint64(b, uint64(id))
	}
	for _, id := range have {
		b = le.AppendUint64(b, uint64(id))
	}
	return b
}

func decodeReport(b []byte) (r replica.Report, have []object.ID, err error) {
	d := decoder{b: b}
	r.Mark = d.version()
	n := d.u32()
	if uint64(n)*8 > uint64(len(d.b)) {
		return r, nil, errMessage
	}
	for range n {
		r.Recent = append(r.Recent, object.ID(d.u64()))
	}
	for len(d.b) > 0 && d.err == nil {
		have = append(have, object.ID(d.u64()))
	}
	return r, have, d.end()
}

func appendVersion(b []byte, v object.Version) []byte {
	return le.AppendUint64(le.AppendUint64(b, v.Epoch), v.Seq)
}

// decoder takes numbers off a message. What is missing is 0 and makes end fail.
type decoder struct {
	b   []byte
	err error
}

func (d *decoder) take(n int) []byte {
	if len(d.b) < n {
		d.b, d.err = nil, errMessage
		return make([]byte, n)
	}
	b := d.b[:n]
	d.b = d.b[n:]
	return b
}

func (d *decoder) u8() uint8   { return d.take(1)[0] }
func (d *decoder) u16() uint16 { return le.Uint16(d.take(2)) }
func (d *decoder) u32() uint32 { return le.Uint32(d.take(4)) }
func (d *decoder) u64() uint64 { return le.Uint64(d.take(8)) }

func (d *decoder) version() object.Version { return object.Version{Epoch: d.u64(), Seq: d.u64()} }

// end fails if the message was too short or is too long.
func (d *decoder) end() error {
	if d.err == nil && len(d.b) > 0 {
		return errMessage
	}
	return d.err
}

// unknown turns a failure after which nobody knows whether the request was carried out,
// or after which another node can do it, into replica.ErrRetry.
func unknown(err error) error {
	if err == nil || errors.Is(err, replica.ErrRetry) || errors.Is(err, replica.ErrEpoch) {
		return err
	}
	for _, kind := range []error{peer.ErrDisconnected, peer.ErrBusy, peer.ErrTimeout, peer.ErrClosed, object.ErrClosed, errNotKept} {
		if errors.Is(err, kind) {
			return fmt.Errorf("%w: %w", replica.ErrRetry, err)
		}
	}
	return err
}
