package vdi_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"time"

	"sheepdog/storage/object"
	"sheepdog/vdi"
	"sheepdog/vdi/vditest"
)

// storySize is the size of volumes in stories: more than the parts of one request, in the smallest objects.
const storySize = 35 << 20

// place is where a register is in stories: the last one is far away from the others.
func place(n int) int64 {
	if n == registers-1 {
		return storySize - 1<<20 + 4096
	}
	return register(n)
}

const sector = 512 // all that a register has

func storyShift(rng *rand.Rand) uint8 { return uint8([]int{20, 20, 21, 22}[rng.IntN(4)]) }

// saga is what happened to the registers of a volume.
type saga struct {
	ops   [registers][]operation
	shots map[object.VID]int64 // when a vid had become a snapshot
	turns [2]int               // how many changes of it as a whole have begun, and are over
	backs []back               // when it was rolled back

	flushes []flush
}

// back is an attempt to roll a volume back. Until it is answered, some gateways may read what there was before, and others what is there
// since; and if who did it was killed, until somebody else has taken the volume over, and answers a write.
type back struct {
	begin, end int64
	failed     bool
}

// over is when nobody reads any more what there was before.
func (h *saga) over(b back) int64 {
	if !b.failed {
		return b.end
	}
	over := int64(math.MaxInt64)
	for n := range h.ops {
		for i := range h.ops[n] {
			if o := &h.ops[n][i]; o.deed >= writes && o.deed != grows && !o.maybe && o.begin > b.end {
				over = min(over, o.end)
			}
		}
	}
	return over
}

// turnedBack has operations where reads that were under way during a rollback may have found what was there when it began. Where several
// have found the same since then, the first that has ended stands for all.
func (h *saga) turnedBack(ops []operation) (list []operation) {
	type found struct {
		deed  deed
		value uint32
		begin int64
	}
	first := map[found]int{}
	written := map[uint32]int64{} // from when on a value was written, which is 0 in the beginning
	for _, o := range ops {
		if at, ok := written[o.leaves()]; o.deed >= writes && (!ok || o.begin < at) {
			written[o.leaves()] = o.begin
		}
	}
	written[0] = 0
	overs := make([]int64, len(h.backs))
	for i, b := range h.backs {
		overs[i] = h.over(b)
	}
	for _, o := range ops {
		begin := o.begin
		for i, b := range h.backs {
			if o.deed == reads && o.begin < overs[i] && b.begin < o.end {
				begin = min(begin, max(b.begin, written[o.value]))
			}
		}
		if begin == o.begin {
			list = append(list, o)
			continue
		}
		o.begin = begin
		if i, ok := first[found{o.deed, o.value, begin}]; ok {
			list[i].end = min(list[i].end, o.end)
			continue
		}
		first[found{o.deed, o.value, begin}] = len(list)
		list = append(list, o)
	}
	return list
}

// on is an operation on a register.
type on struct {
	n int
	operation
}

func (s *tale) tick() (at int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clock++
	return s.clock
}

func (s *tale) value() uint32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.next++
	return s.next
}

// note adds operations that began together, and end now. What failed may be carried out later, unless it was refused.
func (s *tale) note(h *saga, begin int64, err error, list ...on) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clock++
	for _, o := range list {
		if o.begin, o.end = begin, s.clock; err != nil {
			if o.deed == reads || o.deed == looks {
				continue
			}
			if o.maybe = true; !errors.Is(err, vdi.ErrInvalid) && !errors.Is(err, object.ErrLost) {
				o.end = 0
			}
		}
		h.ops[o.n] = append(h.ops[o.n], o.operation)
	}
}

// shot notes that the vid became a snapshot before now, and what that has. It has it from one moment between begin and now.
func (s *tale) shot(h *saga, vid object.VID, begin int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clock++
	if h.shots == nil {
		h.shots = map[object.VID]int64{}
	}
	h.shots[vid] = s.clock
	s.counts["snapshots"]++
}

// turn begins a change of a volume as a whole, or ends it.
func (s *tale) turn(h *saga, ended int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h.turns[ended]++
}

// turned is how many such changes are over; with begun, those under way too.
func (s *tale) turned(h *saga, begun bool) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if begun {
		return h.turns[0]
	}
	return h.turns[1]
}

// verify says what is wrong with a saga, with cuts of the power.
func (h *saga) verify(cuts []*cut) string {
	for n, ops := range h.ops {
		for i := range ops {
			o := &ops[i]
			at, ok := h.shots[o.vid]
			if !ok || o.end != 0 && o.end < at {
				continue
			}
			if o.begin > at && o.maybe {
				at = o.begin
			}
			if o.begin > at {
				return fmt.Sprintf("register %d: %v for VDI %s, which was a snapshot at %d", n, o, o.vid, at)
			}
			o.end = at
		}
		ops, why := h.powerless(h.turnedBack(ops), cuts)
		if why == "" {
			why = linearizable(ops)
		}
		if why != "" {
			return fmt.Sprintf("register %d: %s", n, why)
		}
	}
	return ""
}

// look reads a register; outside if the volume is too small for it.
func look(s *vdi.Service, name, tag string, n int) (uint32, error) {
	v, err := s.Open(ctx, name, tag, vdi.OpenOptions{ReadOnly: true})
	if err != nil {
		return 0, err
	}
	defer v.Close()
	if place(n) >= v.Size() {
		return outside, nil
	}
	p := make([]byte, 4)
	_, err = v.ReadAt(ctx, p, place(n))
	return binary.LittleEndian.Uint32(p), err
}

func lookAll(s *vdi.Service, name, tag string) (values [registers]uint32, err error) {
	for n := range registers {
		if values[n], err = look(s, name, tag, n); err != nil {
			break
		}
	}
	return values, err
}

// client is one of the volume v.
type client struct {
	*tale
	g      *vditest.Gateway
	rng    *rand.Rand
	reads  bool // only
	native bool // says for each request which vid it means
	h      *saga
	used   []int

	v     *vdi.Volume
	vid   object.VID
	since int // see turned
}

// serve has two clients at a gateway, until it is killed.
func (s *tale) serve(i int, seed uint64) {
	for k := range uint64(2) {
		c := &client{
			tale: s, g: s.gateway(i), rng: rand.New(rand.NewPCG(seed, k)), reads: s.calm && i > 0, native: k == 1 && s.seed%3 == 0, h: &s.v, used: s.used,
		}
		s.clients.Go(func() {
			if err := c.run(); err != nil && !c.g.Killed() {
				s.fail("through %s: %v", c.g.Name, err)
			}
		})
	}
}

func (c *client) run() error {
	c.g.CatchUp() // it has just been made
	if err := c.open(); err != nil {
		return err
	}
	for !c.over() {
		began := time.Now()
		if c.wait > 0 {
			time.Sleep(time.Duration(c.rng.Int64N(int64(c.wait))))
		}
		again := c.rng.IntN(100) == 0
		switch err := c.operate(); {
		case err == nil:
		case lost(err):
		case errors.Is(err, vdi.ErrInvalid) && c.turned(c.h, true) > c.since, c.native && errors.Is(err, vdi.ErrReadOnly):
			again = again || c.native || c.rng.IntN(3) == 0
		default:
			return err
		}
		if c.rng.IntN(50) == 0 {
			if err := c.flush(c.h, c.v); err != nil && !lost(err) {
				return err
			}
		}
		if again {
			if err := errors.Join(c.v.Close(), c.open()); err != nil {
				return err
			}
		}
		if time.Now().Equal(began) {
			time.Sleep(20 * time.Microsecond) // what takes no time would never let others go on
		}
	}
	return c.v.Close()
}

func (c *client) open() (err error) {
	c.since = c.turned(c.h, false)
	if c.rng.IntN(3) == 0 {
		c.g.CatchUp()
	} else {
		c.since = -1 // it may be smaller than this gateway knows
	}
	for ; ; time.Sleep(time.Millisecond) {
		if !c.native {
			c.v, err = c.g.Open(ctx, "v", "", vdi.OpenOptions{Client: "story"})
			return err
		}
		header, err := c.g.FindHeader("v", "", 0)
		if err != nil {
			return err
		}
		c.vid = header.VID
		if c.v, err = c.g.OpenVID(header.VID, "story", false); err != nil || !c.v.ReadOnly() {
			return err
		}
		c.v.Close() // a snapshot meanwhile
	}
}

func (c *client) operate() (err error) {
	defer c.happened("operations")
	n := c.used[c.rng.IntN(len(c.used))]
	if place(n) >= c.v.Size() {
		return nil
	}
	switch k := c.rng.IntN(16); {
	case c.reads || k < 8:
		return c.read(n)
	case k < 12:
		return c.write(n)
	case k < 13 && !c.native: // reads, and writes, with nothing in between
		o, begin := operation{deed: swaps, next: c.value()}, c.tick()
		err = c.v.Update(ctx, place(n), sector, 0, func(p []byte) error {
			o.value = binary.LittleEndian.Uint32(p)
			binary.LittleEndian.PutUint32(p, o.next)
			return nil
		})
		o.volume = c.v
		c.note(c.h, begin, err, on{n, o})
		return err
	case k < 14: // a block
		flags := []vdi.Flags{0, vdi.FlagNoHole, vdi.FlagFUA}[c.rng.IntN(3)]
		return c.clear(vdi.Request{Op: vdi.OpZero, Flags: flags, Off: place(n), Len: min(object.BlockSize, c.v.Size()-place(n))})
	case k < 15: // its object
		off := place(n) &^ (c.v.ObjectSize() - 1)
		op := []vdi.Op{vdi.OpDiscard, vdi.OpZero}[c.rng.IntN(2)]
		return c.clear(vdi.Request{Op: op, Off: off, Len: min(c.v.ObjectSize(), c.v.Size()-off)})
	}
	if off := place(n) * int64(c.rng.IntN(2)); c.rng.IntN(3) == 0 { // from there to the end, or all
		return c.clear(vdi.Request{Op: vdi.OpDiscard, Off: off, Len: c.v.Size() - off})
	}
	return nil
}

func (c *client) read(n int) error {
	begin, p := c.tick(), make([]byte, sector)
	err := request(c.v, vdi.Request{Op: vdi.OpRead, Off: place(n), Len: sector, Data: p, VID: c.vid})
	c.note(c.h, begin, err, on{n, operation{value: binary.LittleEndian.Uint32(p), vid: c.vid}})
	return err
}

func (c *client) write(n int) error {
	begin, p, value := c.tick(), make([]byte, sector), c.value()
	binary.LittleEndian.PutUint32(p, value)
	r := vdi.Request{Op: vdi.OpWrite, Off: place(n), Len: sector, Data: p, VID: c.vid}
	if c.rng.IntN(8) == 0 {
		r.Flags = vdi.FlagFUA
	}
	err := request(c.v, r)
	if !errors.Is(err, vdi.ErrReadOnly) {
		c.note(c.h, begin, err, on{n, operation{deed: writes, value: value, vid: c.vid, durable: r.Flags&vdi.FlagFUA != 0, volume: c.v}})
	}
	return err
}

// clear has a range become zeros.
func (c *client) clear(r vdi.Request) error {
	var list []on
	for n := range registers {
		if place(n) >= r.Off && place(n) < r.Off+r.Len {
			list = append(list, on{n, operation{deed: writes, vid: c.vid, durable: r.Flags&vdi.FlagFUA != 0, volume: c.v}})
		}
	}
	if r.Len <= c.v.ObjectSize() {
		r.VID = c.vid
	} else if c.native {
		return nil // see Request.VID
	}
	begin := c.tick()
	err := request(c.v, r)
	if !errors.Is(err, vdi.ErrReadOnly) {
		c.note(c.h, begin, err, list...)
	}
	return err
}

// snap is a snapshot, and what it has.
type snap struct {
	tag    string
	vid    object.VID
	values [registers]uint32
}

// take takes a snapshot of v. What it has was there at one moment between its begin and its
// end: so to say all registers were read then. It returns nil if nothing is known of it.
func (s *tale) take(g *vditest.Gateway, tag string, rng *rand.Rand) *snap {
	begin := s.tick()
	info, err := g.Snapshot(ctx, "v", tag)
	if err != nil {
		if !g.Killed() && !lost(err) {
			s.fail("snapshot through %s: %v", g.Name, err)
		}
		return nil
	}
	s.shot(&s.v, info.VID, begin)
	end := s.tick()
	h := s.knowing(rng)
	values, err := lookAll(h.Service, "v", tag)
	if err != nil {
		if !h.Killed() {
			s.fail("read snapshot %s through %s: %v", tag, h.Name, err)
		}
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for n := range registers {
		s.v.ops[n] = append(s.v.ops[n], operation{deed: looks, value: values[n], begin: begin, end: end})
	}
	return &snap{tag, info.VID, values}
}

// keeps fails if a snapshot is not what it was.
func (s *tale) keeps(g *vditest.Gateway, name string, x *snap) {
	values, err := lookAll(g.Service, name, x.tag)
	switch {
	case err != nil && !g.Killed():
		s.fail("read snapshot %s of %s through %s: %v", x.tag, name, g.Name, err)
	case err == nil && values != x.values:
		s.fail("snapshot %s of %s is %v through %s, was %v", x.tag, name, values, g.Name, x.values)
	}
}

// snapshots takes snapshots, reads, deletes them, and rolls back to them, in any order.
func (s *tale) snapshots(rng *rand.Rand) {
	var list []*snap
	for k := 0; s.nap(rng, s.rest); k++ {
		if x := s.take(s.knowing(rng), fmt.Sprint("s", k), rng); x != nil {
			list = append(list, x)
		}
		if len(list) == 0 {
			continue
		}
		i := rng.IntN(len(list))
		switch rng.IntN(4) {
		case 0:
			s.keeps(s.knowing(rng), "v", list[i])
		case 1:
			if rng.IntN(2) == 0 {
				s.rollback(list[i], rng)
			}
		case 2:
			g := s.knowing(rng)
			if err := g.Delete(ctx, "v", list[i].tag); err != nil && !g.Killed() {
				s.fail("delete snapshot through %s: %v", g.Name, err)
			}
			list = append(list[:i], list[i+1:]...)
		}
	}
	for _, x := range list {
		s.keeps(s.knowing(rng), "v", x)
	}
}

// change changes v as a whole, through one gateway after the other if they are killed. What was begun through a gateway
// that was killed is over when another one has done it: what comes later is refused.
func (s *tale) change(rng *rand.Rand, what string, do func(*vditest.Gateway) error, list ...on) {
	s.turn(&s.v, 0)
	defer s.turn(&s.v, 1)
	var begun []int64
	for {
		g := s.some(rng)
		if rng.IntN(2) == 0 {
			g.CatchUp()
		}
		begun = append(begun, s.tick())
		err := do(g)
		if what == "rollback" {
			s.wasRolledBack(&s.v, begun[len(begun)-1], err)
		}
		if err == nil {
			break
		}
		if !g.Killed() && !lost(err) {
			s.fail("%s through %s: %v", what, g.Name, err)
			return
		}
		time.Sleep(time.Millisecond)
	}
	end := s.tick()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, o := range list {
		for i, begin := range begun {
			o.begin, o.end, o.maybe, o.durable = begin, end, i < len(begun)-1, true
			s.v.ops[o.n] = append(s.v.ops[o.n], o.operation)
		}
	}
}

// wasRolledBack notes an attempt that ends now.
func (s *tale) wasRolledBack(h *saga, begin int64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clock++
	h.backs = append(h.backs, back{begin, s.clock, err != nil})
}

func (s *tale) rollback(x *snap, rng *rand.Rand) {
	var list []on
	for n, value := range x.values {
		list = append(list, on{n, operation{deed: puts, value: value}})
	}
	s.change(rng, "rollback", func(g *vditest.Gateway) error {
		_, err := g.Rollback(ctx, "v", x.tag)
		return err
	}, list...)
	s.happened("rollbacks")
}

// resizes makes v smaller and larger. What was cut off never comes back.
func (s *tale) resizes(rng *rand.Rand) {
	for s.nap(rng, 3*s.rest) {
		s.resize(storySomeSize(rng), rng)
		s.nap(rng, s.rest)
		if rng.IntN(3) > 0 {
			s.resize(storySize, rng)
		}
	}
}

// storySomeSize ends before a register or behind it.
func storySomeSize(rng *rand.Rand) int64 {
	n := place(rng.IntN(registers))
	if rng.IntN(2) == 0 {
		return n - rng.Int64N(object.BlockSize)
	}
	return n + sector + rng.Int64N(object.BlockSize)
}

func (s *tale) resize(size int64, rng *rand.Rand) {
	s.change(rng, "resize", func(g *vditest.Gateway) error {
		_, err := g.Resize(ctx, "v", size)
		return err
	}, resized(size)...)
	s.happened("resizes")
	s.lookNow(rng)
}

// resized is what a size means for registers.
func resized(size int64) (list []on) {
	for n := range registers {
		o := on{n, operation{deed: grows}}
		if place(n) >= size {
			o.operation = operation{deed: puts, value: outside}
		}
		list = append(list, o)
	}
	return list
}

// lookNow opens v through a gateway that knows its size, and reads it.
func (s *tale) lookNow(rng *rand.Rand) {
	before := s.turned(&s.v, false)
	g := s.knowing(rng)
	for n := range registers {
		begin := s.tick()
		value, err := look(g.Service, "v", "", n)
		if s.turned(&s.v, true) > before || g.Killed() {
			return // its size may have changed meanwhile, or be unknown
		}
		if err != nil {
			s.fail("read through %s: %v", g.Name, err)
		}
		s.note(&s.v, begin, err, on{n, operation{deed: looks, value: value}})
	}
}

func (s *tale) finishVolume(rng *rand.Rand) {
	s.lookNow(rng)
	s.resize(storySize, rng)
	for _, g := range s.gateways {
		g.CatchUp()
		for n := range registers {
			begin := s.tick()
			value, err := look(g.Service, "v", "", n)
			if err != nil {
				s.fail("read through %s in the end: %v", g.Name, err)
				return
			}
			s.note(&s.v, begin, nil, on{n, operation{deed: looks, value: value}})
		}
	}
	if why := s.v.verify(s.cuts); why != "" {
		s.fail("%s", why)
	}
}
