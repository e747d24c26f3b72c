package vdi_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"sheepdog/vdi"
	"sheepdog/vdi/vditest"
)

// Volumes of the name w come and go. One life of it is a family: its registers are its own, and who has it open
// never sees another life.

// living is what lives have in common.
type living struct {
	*tale
	ends  saga // its turns alone: what ends a life
	snaps []*lifeSnap
}

// lifeSnap is a snapshot of a life.
type lifeSnap struct {
	snap
	family uint64
}

// life returns the saga of a family.
func (s *tale) life(family uint64) *saga {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lives[family] == nil {
		s.lives[family] = &saga{}
	}
	return s.lives[family]
}

// live has w made and deleted, while others use it.
func (s *tale) live(rng *rand.Rand) {
	l := &living{tale: s}
	var visitors sync.WaitGroup
	defer visitors.Wait()
	for i := range gatewayNames {
		own := rand.New(rand.NewPCG(rng.Uint64(), 2))
		visitors.Go(func() {
			for s.nap(own, s.rest) {
				l.visit(i, own)
			}
		})
	}
	own := rand.New(rand.NewPCG(rng.Uint64(), 3))
	visitors.Go(func() { l.snapshots(own) })
	for s.nap(rng, s.rest/2) {
		g := s.some(rng)
		if rng.IntN(2) == 0 {
			g.CatchUp()
		}
		var err error
		switch rng.IntN(5) {
		case 0:
			err = l.rollback(g, rng)
		case 1:
			if x := l.one(rng, true); x != nil {
				err = g.Delete(ctx, "w", x.tag)
			}
		case 2:
			err = l.delete(g)
		case 3:
			err = l.create(g, rng)
		case 4:
			if x := l.one(rng, false); x != nil {
				s.keeps(s.knowing(rng), "w", &x.snap)
			}
		}
		if err != nil && !g.Killed() && !lost(err) {
			s.fail("life through %s: %v", g.Name, err)
			return
		}
	}
}

func (l *living) create(g *vditest.Gateway, rng *rand.Rand) error {
	o := vdi.CreateOptions{Name: "w", Size: storySize, ObjectSizeShift: storyShift(rng), Copies: 1 + rng.IntN(vditest.MaxCopies)}
	_, err := g.Create(ctx, o)
	if errors.Is(err, vdi.ErrExists) {
		return nil
	}
	if err == nil {
		l.happened("lives")
	}
	return err
}

// now is the life that w has by a gateway's catalog; nil if there is none.
func (l *living) now(g *vditest.Gateway) *saga {
	v, err := g.Catalog.Find("w", "")
	if err != nil {
		return nil
	}
	return l.life(v.Family)
}

// delete ends a life.
func (l *living) delete(g *vditest.Gateway) error {
	g.CatchUp()
	before, err := g.Catalog.Find("w", "")
	if err != nil {
		return nil
	}
	h := l.life(before.Family)
	begin := l.tick()
	l.turn(&l.ends, 0)
	defer l.turn(&l.ends, 1)
	err = g.Delete(ctx, "w", "")
	if errors.Is(err, vdi.ErrBusy) || errors.Is(err, vdi.ErrNotFound) && l.now(g) == nil {
		return nil
	}
	l.note(h, begin, outcome(g, err), all(gone)...)
	return err
}

// outcome is what came of something that a gateway did: if it was killed, that was perhaps before it could tell others, who read
// what was until that is collected.
func outcome(g *vditest.Gateway, err error) error {
	if err == nil && g.Killed() {
		return errors.New("killed")
	}
	return err
}

// all is what leaves all registers at a value.
func all(value uint32) (list []on) {
	for n := range registers {
		list = append(list, on{n, operation{deed: puts, value: value}})
	}
	return list
}

func (l *living) take(g *vditest.Gateway, tag string) error {
	begin := l.tick()
	info, err := g.Snapshot(ctx, "w", tag)
	if errors.Is(err, vdi.ErrNotFound) || errors.Is(err, vdi.ErrBusy) {
		return nil
	}
	if err != nil {
		return err
	}
	v, ok := g.Catalog.Get(info.VID)
	if !ok {
		return fmt.Errorf("there is no snapshot %s of w", tag)
	}
	h := l.life(v.Family)
	l.shot(h, info.VID, begin)
	end := l.tick()
	x := &lifeSnap{snap{tag: tag, vid: info.VID}, v.Family}
	if x.values, err = lookAll(g.Service, "w", tag); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for n := range registers {
		h.ops[n] = append(h.ops[n], operation{deed: looks, value: x.values[n], begin: begin, end: end})
	}
	l.snaps = append(l.snaps, x)
	return nil
}

// snapshots takes snapshots of whatever life there is.
func (l *living) snapshots(rng *rand.Rand) {
	for k := 0; l.nap(rng, l.rest); k++ {
		g := l.some(rng)
		if err := l.take(g, fmt.Sprint("u", k)); err != nil && !g.Killed() && !lost(err) {
			l.fail("snapshot of w through %s: %v", g.Name, err)
		}
	}
}

// one is one of the snapshots, nil if there is none. It may be forgotten.
func (l *living) one(rng *rand.Rand, forget bool) *lifeSnap {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.snaps) == 0 {
		return nil
	}
	i := rng.IntN(len(l.snaps))
	x := l.snaps[i]
	if forget {
		l.snaps = append(l.snaps[:i:i], l.snaps[i+1:]...)
	}
	return x
}

// rollback has w be what some life was once: its own, or a former one, which ends the one it has.
func (l *living) rollback(g *vditest.Gateway, rng *rand.Rand) error {
	x := l.one(rng, false)
	if x == nil {
		return nil
	}
	g.CatchUp()
	h, now := l.life(x.family), l.now(g)
	var list []on
	for n, value := range x.values {
		list = append(list, on{n, operation{deed: puts, value: value}})
	}
	begin := l.tick()
	l.turn(&l.ends, 0)
	defer l.turn(&l.ends, 1)
	_, err := g.Rollback(ctx, "w", x.tag)
	err = outcome(g, err)
	l.note(h, begin, err, list...)
	l.wasRolledBack(h, begin, err)
	if now != nil && now != h {
		l.note(now, begin, err, all(gone)...)
	}
	if err == nil {
		l.happened("rollbacks")
	}
	return err
}

// visit opens w through a gateway, whatever life it has, uses it for a while, and gives it up.
func (l *living) visit(i int, rng *rand.Rand) {
	c := client{
		tale: l.tale, g: l.gateway(i), rng: rng, reads: l.calm && i > 0, used: []int{rng.IntN(registers), rng.IntN(registers)},
		since: l.turned(&l.ends, false),
	}
	if rng.IntN(2) == 0 {
		c.g.CatchUp()
	} else {
		c.since = -1 // what it opens may be gone already
	}
	var err error
	c.v, err = c.g.Open(ctx, "w", "", vdi.OpenOptions{Client: "story"})
	if err == nil {
		defer c.v.Close()
		v, ok := c.g.Catalog.Get(c.v.VID())
		if !ok || v.Name != "w" {
			return // it was deleted just now, or a sweep has found something of what it was before
		}
		c.h = l.life(v.Family)
		for range rng.IntN(30) {
			if err = c.operate(); err == nil && l.powerless() && rng.IntN(8) == 0 {
				err = c.flush(c.h, c.v)
			}
			if err != nil && !lost(err) || !l.nap(rng, l.rest/4) {
				break
			}
		}
	}
	switch {
	case err == nil, c.g.Killed(), lost(err), errors.Is(err, vdi.ErrBusy):
	case errors.Is(err, vdi.ErrNotFound) && (c.v == nil || l.turned(&l.ends, true) > c.since):
	default:
		l.fail("w through %s: %v", c.g.Name, err)
	}
	time.Sleep(100 * time.Microsecond)
}

func (s *tale) finishLives() {
	for family, h := range s.lives {
		if why := h.verify(s.cuts); why != "" {
			s.fail("life %d of w: %s", family, why)
		}
	}
}
