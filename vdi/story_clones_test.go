package vdi_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"

	"sheepdog/storage/object"
	"sheepdog/vdi"
	"sheepdog/vdi/vditest"
)

// cloned is a clone that one client alone uses, one operation at a time: what is in it, and in its
// snapshots, is known.
type cloned struct {
	name   string
	values [registers]uint32
	snaps  []*snap
	made   int  // snapshots and clones of it
	unsure bool // a gateway was killed that had something in hand
}

// clones makes clones, of v and of other clones, and uses them.
func (s *tale) clones(rng *rand.Rand) {
	for k := 0; s.nap(rng, 2*s.rest); k++ {
		c := &cloned{name: fmt.Sprint("c", k)}
		g := s.writer(rng)
		if err := s.clone(g, c, rng.IntN(2) == 0); err != nil {
			if !g.Killed() && !lost(err) {
				s.fail("clone %s through %s: %v", c.name, g.Name, err)
				return
			}
			continue
		}
		s.adopt(c)
		for range rng.IntN(12) {
			c := s.cloned[max(0, len(s.cloned)-1-rng.IntN(3))]
			if !s.nap(rng, s.rest) {
				break
			}
			if c.unsure {
				continue
			}
			if g, err := s.useClone(c, rng); err != nil && !g.Killed() {
				s.fail("clone %s through %s: %v", c.name, g.Name, err)
				return
			}
		}
		if rng.IntN(3) > 0 {
			g := s.knowing(rng)
			if err := g.Delete(ctx, c.name, ""); err != nil && !g.Killed() {
				s.fail("delete clone %s through %s: %v", c.name, g.Name, err)
			}
			c.unsure = true // its snapshots stay
		}
	}
}

func (s *tale) adopt(c *cloned) {
	s.cloned = append(s.cloned, c)
	s.happened("clones")
}

// clone makes a clone of v, which hangs on no snapshot that is there if alone.
func (s *tale) clone(g *vditest.Gateway, c *cloned, alone bool) (err error) {
	g.CatchUp()
	begin := s.tick()
	info, err := g.Snapshot(ctx, "v", c.name)
	if err != nil {
		return err
	}
	s.shot(&s.v, info.VID, begin)
	if _, err = g.Clone(ctx, "v", c.name, c.name); err != nil {
		return err
	}
	if c.values, err = lookAll(g.Service, "v", c.name); err != nil {
		return err
	}
	if alone {
		err = g.Delete(ctx, "v", c.name)
	}
	return err
}

// useClone changes a clone through one gateway, and reads it through another.
func (s *tale) useClone(c *cloned, rng *rand.Rand) (*vditest.Gateway, error) {
	g := s.writer(rng)
	g.CatchUp()
	c.unsure = true
	before, failed := c.snaps, false
	for range 1 + rng.IntN(4) {
		err := s.changeClone(g, c, rng)
		if failed = lost(err); failed {
			break
		}
		if err != nil {
			return g, err
		}
	}
	if s.powerless() {
		if err := s.flushClone(g, c, before, failed); err != nil {
			return g, err
		}
	}
	c.unsure = false
	h := s.knowing(rng)
	return h, s.verifyClone(c, h)
}

// flushClone makes durable what was done to a clone. If some of it is lost, or has failed, it goes on from what there is.
func (s *tale) flushClone(g *vditest.Gateway, c *cloned, before []*snap, failed bool) error {
	v, err := g.Open(ctx, c.name, "", vdi.OpenOptions{Client: "story"})
	if err != nil {
		return err
	}
	defer v.Close()
	err = v.Flush(ctx)
	if !lost(err) && !failed {
		return err
	}
	s.happened("losses of clones")
	for range 10 {
		if !lost(err) {
			break
		}
		err = v.Flush(ctx)
	}
	if err != nil {
		return err
	}
	c.snaps = slices.DeleteFunc(c.snaps, func(x *snap) bool { return !slices.Contains(before, x) }) // it is not known what others have
	c.values, err = lookAll(g.Service, c.name, "")
	return err
}

// changeClone does one thing to a clone.
func (s *tale) changeClone(g *vditest.Gateway, c *cloned, rng *rand.Rand) (err error) {
	i := 0
	if len(c.snaps) > 0 {
		i = rng.IntN(len(c.snaps))
	}
	switch k := rng.IntN(12); {
	case k < 2:
		size := int64(storySize)
		if rng.IntN(2) == 0 {
			size = storySomeSize(rng)
		}
		_, err = g.Resize(ctx, c.name, size)
		for n := range registers {
			o := resized(size)[n]
			c.values[n], _ = o.step(c.values[n])
		}
	case k < 4:
		x := &snap{tag: fmt.Sprint("t", c.made), values: c.values}
		c.made++
		if _, err = g.Snapshot(ctx, c.name, x.tag); err == nil {
			c.snaps = append(c.snaps, x)
		}
	case k < 5 && len(c.snaps) > 0:
		_, err = g.Rollback(ctx, c.name, c.snaps[i].tag)
		c.values = c.snaps[i].values
	case k < 6 && len(c.snaps) > 0:
		err = g.Delete(ctx, c.name, c.snaps[i].tag)
		c.snaps = append(c.snaps[:i:i], c.snaps[i+1:]...)
	case k < 7 && len(c.snaps) > 0:
		d := &cloned{name: fmt.Sprint(c.name, "-", c.made), values: c.snaps[i].values}
		c.made++
		if _, err = g.Clone(ctx, c.name, c.snaps[i].tag, d.name); err == nil {
			s.adopt(d)
		}
	default:
		err = s.writeClone(g, c, rng)
	}
	return err
}

// writeClone writes to a clone, or clears some of it.
func (s *tale) writeClone(g *vditest.Gateway, c *cloned, rng *rand.Rand) (err error) {
	v, err := g.Open(ctx, c.name, "", vdi.OpenOptions{Client: "story"})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	n := rng.IntN(registers)
	if (c.values[n] == outside) != (place(n) >= v.Size()) {
		return fmt.Errorf("has %d bytes, register %d should be %d", v.Size(), n, c.values[n])
	}
	if c.values[n] == outside {
		return nil
	}
	var r vdi.Request
	switch rng.IntN(6) {
	case 0:
		r = vdi.Request{Op: vdi.OpZero, Off: place(n), Len: min(object.BlockSize, v.Size()-place(n))}
	case 1:
		off := place(n) &^ (v.ObjectSize() - 1)
		r = vdi.Request{Op: vdi.OpDiscard, Off: off, Len: min(v.ObjectSize(), v.Size()-off)}
	default:
		value, p := s.value(), make([]byte, sector)
		binary.LittleEndian.PutUint32(p, value)
		_, err := v.WriteAt(ctx, p, place(n))
		c.values[n] = value
		return err
	}
	for n := range registers {
		if place(n) >= r.Off && place(n) < r.Off+r.Len {
			c.values[n] = 0
		}
	}
	return request(v, r)
}

// verifyClone reads a clone and one of its snapshots.
func (s *tale) verifyClone(c *cloned, g *vditest.Gateway) error {
	got, err := lookAll(g.Service, c.name, "")
	if err == nil && got != c.values {
		err = fmt.Errorf("the registers are %v, want %v", got, c.values)
	}
	if err == nil && len(c.snaps) > 0 {
		s.keeps(g, c.name, c.snaps[len(c.snaps)/2])
	}
	return err
}

func (s *tale) finishClones() {
	for _, c := range s.cloned {
		g := s.gateways[len(c.name)%len(s.gateways)]
		g.CatchUp()
		if c.unsure {
			continue
		}
		if err := s.verifyClone(c, g); err != nil {
			s.fail("clone %s through %s in the end: %v", c.name, g.Name, err)
		}
		for _, x := range c.snaps {
			s.keeps(g, c.name, x)
		}
	}
}
