package vdi_test

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"

	"sheepdog/storage/object"
	"sheepdog/vdi"
	"sheepdog/vdi/vditest"
)

// machine is a snapshot of v that has the state of a machine: as QEMU's savevm makes it.
type machine struct {
	*snap
	size  int64
	clock uint64
	state map[uint32][]byte // by index
	mixed bool              // there may be more, of an earlier one that was given up
}

const stateSize = 2 * object.BlockSize // of an object of a state that is looked at

// machines saves states of a machine with snapshots, reads them, goes back to them, and deletes them.
func (s *tale) machines(rng *rand.Rand) {
	var list []*machine
	touched := map[object.VID]bool{} // vids that have some state
	for k := 0; s.nap(rng, 2*s.rest); k++ {
		if m := s.save(fmt.Sprint("m", k), touched, rng); m != nil {
			s.happened("states of machines")
			list = append(list, m)
		}
		if len(list) == 0 {
			continue
		}
		i := rng.IntN(len(list))
		s.load(list[i], rng)
		switch rng.IntN(5) {
		case 0:
			s.rollback(list[i].snap, rng)
		case 1:
			s.forget(list[i], rng)
			list = append(list[:i], list[i+1:]...)
		}
	}
	for _, m := range list {
		s.load(m, rng)
		s.keeps(s.knowing(rng), "v", m.snap)
	}
}

// save is savevm. It returns nil if v had another vid before its end.
func (s *tale) save(tag string, touched map[object.VID]bool, rng *rand.Rand) *machine {
	g := s.knowing(rng)
	h, err := g.FindHeader("v", "", 0)
	if err != nil {
		if !g.Killed() {
			s.fail("look for v: %v", err)
		}
		return nil
	}
	if !touched[h.VID] {
		s.stateless(g, h.VID)
	}
	before := touched[h.VID]
	touched[h.VID] = true
	m := &machine{mixed: before, size: int64(1 + rng.IntN(8<<20)), clock: rng.Uint64(), state: map[uint32][]byte{}}
	err = s.writeState(g, h.VID, m, rng)
	if err == nil {
		err = g.Describe(ctx, h.VID, tag, m.size, m.clock)
	}
	if err != nil {
		if !g.Killed() && !lost(err) && !errors.Is(err, vdi.ErrReadOnly) && !errors.Is(err, vdi.ErrNotFound) {
			s.fail("save a machine's state through %s: %v", g.Name, err)
		}
		return nil
	}
	if rng.IntN(3) == 0 {
		g = s.knowing(rng)
	}
	if m.snap = s.take(g, tag, rng); m.snap == nil {
		return nil
	}
	if m.vid != h.VID {
		if !touched[m.vid] {
			s.stateless(s.knowing(rng), m.vid)
		}
		return nil
	}
	return m
}

// writeState writes some of the state, some of it twice, and flushes it where the power may be cut.
func (s *tale) writeState(g *vditest.Gateway, vid object.VID, m *machine, rng *rand.Rand) (err error) {
	if s.powerless() {
		v, cannot := g.OpenVID(vid, "story", true) // which may be a snapshot by now, and be deleted
		if cannot != nil {
			return cannot
		}
		defer v.Close()
		defer func() { err = cmp.Or(err, v.Flush(ctx)) }()
	}
	for range 1 + rng.IntN(4) {
		index, off := uint32(rng.IntN(3)), uint32(rng.IntN(2))*object.BlockSize
		p := bytes.Repeat(binary.LittleEndian.AppendUint32(nil, s.value()), object.BlockSize/4)
		afresh := m.state[index] == nil || rng.IntN(3) == 0
		if err := g.WriteVMState(ctx, vdi.VMState{VID: vid, Index: index, Off: off}, p, afresh, 0); err != nil {
			return err
		}
		if afresh {
			m.state[index] = make([]byte, stateSize)
		}
		copy(m.state[index][off:], p)
	}
	return nil
}

// stateless fails if a vid that nobody wrote a state of has one.
func (s *tale) stateless(g *vditest.Gateway, vid object.VID) {
	for index := range uint32(3) {
		err := g.ReadVMState(ctx, vdi.VMState{VID: vid, Index: index}, make([]byte, stateSize))
		if !errors.Is(err, vdi.ErrNotFound) && !g.Killed() {
			s.fail("VDI %s has a machine's state that nobody wrote, by %s: %v", vid, g.Name, err)
		}
	}
}

// load is loadvm, without rolling back.
func (s *tale) load(m *machine, rng *rand.Rand) {
	g := s.knowing(rng)
	h, err := g.FindHeader("v", m.tag, 0)
	if !g.Killed() && (err != nil || h.VID != m.vid || h.VMStateSize != m.size || h.VMClock != m.clock) {
		s.fail("machine %s is described as %+v, %v; want VDI %s, %d bytes, clock %d", m.tag, h, err, m.vid, m.size, m.clock)
	}
	for index := range uint32(3) {
		p := make([]byte, stateSize)
		err := g.ReadVMState(ctx, vdi.VMState{VID: m.vid, Index: index}, p)
		switch want := m.state[index]; {
		case g.Killed():
			return
		case want == nil && !m.mixed && !errors.Is(err, vdi.ErrNotFound), want != nil && err != nil:
			s.fail("machine %s, object %d, through %s: %v", m.tag, index, g.Name, err)
		case want != nil && !bytes.Equal(p, want):
			s.fail("machine %s, object %d, through %s is not what was written", m.tag, index, g.Name)
		}
	}
}

// forget deletes a machine's state with its snapshot.
func (s *tale) forget(m *machine, rng *rand.Rand) {
	g := s.knowing(rng)
	if err := g.Delete(ctx, "v", m.tag); err != nil {
		if !g.Killed() {
			s.fail("delete machine %s through %s: %v", m.tag, g.Name, err)
		}
		return
	}
	s.stateless(s.knowing(rng), m.vid)
}
