package consensus

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/hashicorp/raft"
)

// Machine is a deterministic state machine. Its methods are called by one goroutine at
// a time. Apply must not keep command, and nobody changes its result.
type Machine interface {
	Apply(command []byte) (result []byte)
	Snapshot() ([]byte, error)
	Restore(snapshot []byte) error
}

// host runs the machines as raft's one state machine.
type host struct {
	machines map[string]Machine
	onApply  func(machine string)
	window   *window
	applied  uint64 // index of the last entry, for the goroutine that applies; others ask progress
	progress progress
}

func newHost(machines map[string]Machine, onApply func(string)) *host {
	return &host{machines: machines, onApply: onApply, window: newWindow()}
}

// outcome is what host.Apply returns through raft.
type outcome struct {
	index  uint64
	result []byte
	err    error
}

// errForgotten says that nobody knows any more whether the command was applied before.
// All nodes come to this answer alike.
var errForgotten = errors.New("it is unknown whether the command was applied: too many others came after it")

// Apply implements raft.FSM.
func (h *host) Apply(l *raft.Log) any {
	o := h.apply(l)
	o.index, h.applied = l.Index, l.Index
	h.progress.advance(l.Index)
	return o
}

func (h *host) apply(l *raft.Log) outcome {
	e, err := decodeEntry(l.Data)
	if err != nil {
		return outcome{err: err} // refused at the start if it came from the disk
	}
	if e.machine == noMachine {
		return outcome{}
	}
	m := h.machines[e.machine]
	if m == nil {
		return outcome{err: fmt.Errorf("no state machine is named %q in this version", e.machine)}
	}
	if result, ok := h.window.find(e.id); ok {
		return outcome{result: result}
	}
	if !h.window.covers(e.since) {
		return outcome{err: errForgotten}
	}
	result := m.Apply(e.command)
	h.window.add(answer{e.id, l.Index, result})
	h.onApply(e.machine)
	return outcome{result: result}
}

// Snapshot implements raft.FSM.
func (h *host) Snapshot() (raft.FSMSnapshot, error) {
	b := []byte{snapshotFormat}
	b = binary.LittleEndian.AppendUint64(b, h.applied)
	b = binary.LittleEndian.AppendUint64(b, h.window.forgot)
	b = appendCount(b, len(h.machines))
	for _, name := range slices.Sorted(maps.Keys(h.machines)) {
		s, err := h.machines[name].Snapshot()
		if err != nil {
			return nil, fmt.Errorf("snapshot of state machine %q: %w", name, err)
		}
		b = appendBytes(appendBytes(b, []byte(name)), s)
	}
	b = appendCount(b, len(h.window.answers))
	for _, a := range h.window.answers {
		b = binary.LittleEndian.AppendUint64(append(b, a.id[:]...), a.index)
		b = appendBytes(b, a.result)
	}
	return hostSnapshot(b), nil
}

// Restore implements raft.FSM. raft has checked the content against its checksum.
func (h *host) Restore(r io.ReadCloser) error {
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		return fmt.Errorf("read snapshot: %w", err)
	}
	d := decoder{b: b}
	format := byte(snapshotFormat)
	if f := d.take(1); len(f) == 1 {
		format = f[0]
	}
	if format != snapshotFormat && format != snapshotFormatOne {
		return fmt.Errorf("snapshot has format %d, this version knows %d: use a newer sheep", format, snapshotFormat)
	}
	w := newWindow()
	var applied uint64
	if format == snapshotFormat {
		applied, w.forgot = d.number(), d.number()
	}
	for range d.count() {
		name, content := string(d.bytes()), d.bytes()
		if d.err != nil {
			return d.err
		}
		m := h.machines[name]
		if m == nil {
			return fmt.Errorf("snapshot has a state machine %q that this version has not: use a newer sheep", name)
		}
		if err := m.Restore(content); err != nil {
			return fmt.Errorf("restore state machine %q: %w", name, err)
		}
		h.onApply(name)
	}
	for range d.count() {
		var a answer
		copy(a.id[:], d.take(len(a.id)))
		if format == snapshotFormat {
			a.index = d.number()
		}
		a.result = slices.Clone(d.bytes())
		if d.err != nil {
			return d.err
		}
		w.add(a)
	}
	if d.err == nil {
		h.window, h.applied = w, applied
		h.progress.advance(applied)
	}
	return d.err
}

// A snapshot:
//
//	format 2 | index of the last entry 8 | index of the newest forgotten answer 8 |
//	count of machines | name, content … | count of answers | id 16, index 8, result …
//
// Counts and lengths are four bytes, little-endian. Format 1, of before there were
// several nodes, has no indices.
const (
	snapshotFormat    = 2
	snapshotFormatOne = 1
)

// hostSnapshot is complete when made: the machines go on meanwhile.
type hostSnapshot []byte

// Persist implements raft.FSMSnapshot.
func (s hostSnapshot) Persist(sink raft.SnapshotSink) error {
	if _, err := sink.Write(s); err != nil {
		return errors.Join(err, sink.Cancel())
	}
	return sink.Close()
}

// Release implements raft.FSMSnapshot.
func (hostSnapshot) Release() {}

func appendCount(b []byte, n int) []byte { return binary.LittleEndian.AppendUint32(b, uint32(n)) }

func appendBytes(b, s []byte) []byte { return append(appendCount(b, len(s)), s...) }

// decoder reads a snapshot; after an error it returns nothing any more.
type decoder struct {
	b   []byte
	err error
}

func (d *decoder) take(n int) []byte {
	if d.err != nil || n > len(d.b) {
		d.err = io.ErrUnexpectedEOF
		return nil
	}
	s := d.b[:n]
	d.b = d.b[n:]
	return s
}

func (d *decoder) count() int {
	s := d.take(4)
	if s == nil {
		return 0
	}
	return int(binary.LittleEndian.Uint32(s))
}

func (d *decoder) number() uint64 {
	s := d.take(8)
	if s == nil {
		return 0
	}
	return binary.LittleEndian.Uint64(s)
}

func (d *decoder) bytes() []byte { return d.take(d.count()) }
