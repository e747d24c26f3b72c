// Package vditest has objects and a log in memory, so that volumes can be tested, and be
// used in tests of frontends, without a cluster. The objects can crash: what was not
// synced is lost in part, each block for itself.
package vditest

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"

	"sheepdog/storage/object"
)

const blockSize = object.BlockSize

type key struct {
	policy object.PolicyID
	id     object.ID
}

// content is one object. Blocks are never changed, only replaced.
type content struct {
	shift  uint8
	blocks map[uint32]*[blockSize]byte
}

func (c *content) clone() *content {
	return &content{c.shift, maps.Clone(c.blocks)}
}

// image is a set of objects.
type image map[key]*content

func (m image) clone() image {
	c := make(image, len(m))
	for k, o := range m {
		c[k] = o.clone()
	}
	return c
}

// change is a part of an operation that a crash keeps or loses as a whole.
type change func(image)

// unsynced is a change since the last sync. One that is durable by itself is applied
// once more after a crash, so that no older one comes over it.
type unsynced struct {
	change  change
	durable bool
	key     key
	number  int        // of the change
	volume  object.VID // for which it was made
	node    string     // through which it was made
}

// owed is who has made changes.
type owed struct {
	volume object.VID
	node   string
}

// loss are changes of somebody that a power cut may have undone. It is told to each sync that covers some and has begun before one
// was told.
type loss struct {
	first, last int   // changes, by number
	told        int64 // 0: not yet
}

// ticket is what a sync covers: it is taken where it is asked for.
type ticket struct {
	made  int   // changes before
	began int64 // in the order of syncs and what they were told
}

// Objects implements vdi.Objects in memory. Writes wait for Kick, as in the real store.
// Its methods may be called from any goroutine.
type Objects struct {
	// Fault, if set, is asked before each operation; its error is the operation's, which
	// then changes nothing. Set it before use. what is "read", "write", "zero", "discard",
	// "sync", "copy", "delete", "sums", "stat", "extents" or "list".
	Fault func(what string, id object.ID) error
	// Async makes reads and syncs complete on goroutines of their own.
	Async bool

	mu          sync.Mutex
	current     image
	durable     image
	pending     []unsynced
	made        int // changes so far
	held        []*object.Request
	generations map[object.VID]uint64
	dead        bool
	unflushed   map[owed]bool   // who has made changes that no sync of its own has covered
	owed        map[owed][]loss // who is to be told of what was lost
	order       int64           // of syncs
	restarts    uint64

	steps   atomic.Int64 // changing operations so far
	crashAt atomic.Int64 // 0: never
	syncs   atomic.Int64
}

// NewObjects returns an empty set of objects.
func NewObjects() *Objects {
	return &Objects{current: image{}, durable: image{}, generations: map[object.VID]uint64{}, owed: map[owed][]loss{}, unflushed: map[owed]bool{}}
}

// CrashAfter makes every operation from the n-th changing one on fail; Crash then tells
// what is left.
func (o *Objects) CrashAfter(n int64) { o.crashAt.Store(o.steps.Load() + n) }

// Steps counts the changing operations so far.
func (o *Objects) Steps() int64 { return o.steps.Load() }

// Syncs counts the OpSyncs so far.
func (o *Objects) Syncs() int64 { return o.syncs.Load() }

// Step counts a changing operation and fails once the crash has come.
func (o *Objects) Step() error {
	n := o.steps.Add(1)
	if at := o.crashAt.Load(); at != 0 && n >= at {
		return fmt.Errorf("crashed: %w", object.ErrClosed)
	}
	return nil
}

// Crash ends this set of objects, and returns what a power cut leaves: of the changes
// that were not synced each one is kept with the given probability. 1 is the end of
// the process alone.
func (o *Objects) Crash(rng *rand.Rand, keep float64) *Objects {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.dead = true
	next := NewObjects()
	next.durable = o.durable.clone()
	for _, c := range o.pending {
		if c.durable || keep >= 1 || rng.Float64() < keep {
			c.change(next.durable)
		}
	}
	next.current = next.durable.clone()
	next.Fault, next.Async = o.Fault, o.Async
	return next
}

// Restart has what keeps the objects lose its power and come back, while those who use them go on: of the
// changes that were not synced each one is kept with the given probability. Whoever had made some is told
// by its next sync of that volume, once.
func (o *Objects) Restart(rng *rand.Rand, keep float64) {
	o.RestartSome(rng, keep, func(object.PolicyID, object.ID) bool { return true })
}

// RestartSome is Restart of who keeps some of the objects.
func (o *Objects) RestartSome(rng *rand.Rand, keep float64, kept func(object.PolicyID, object.ID) bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	var left []unsynced
	lost := map[owed]loss{}
	for _, c := range o.pending {
		if !kept(c.key.policy, c.key.id) {
			left = append(left, c)
			continue
		}
		if !c.durable {
			w := owed{c.volume, c.node}
			l, ok := lost[w]
			if !ok {
				l.first = c.number
			}
			l.last = c.number
			lost[w] = l
		}
		if c.durable || rng.Float64() < keep {
			c.change(o.durable)
		}
	}
	o.pending = left
	for k := range o.current {
		if kept(k.policy, k.id) {
			delete(o.current, k)
		}
	}
	for k, c := range o.durable {
		if kept(k.policy, k.id) {
			o.current[k] = c.clone()
		}
	}
	o.restarts++
	for w, l := range lost {
		o.owed[w] = append(o.owed[w], l)
	}
}

// Restarts counts how often Restart was called.
func (o *Objects) Restarts() uint64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.restarts
}

// Unflushed lists the vids for which somebody has made changes that no sync of its own, but FlagAll, has covered. A node of a cluster
// remembers who holds them until there is one.
func (o *Objects) Unflushed() []object.VID {
	o.mu.Lock()
	defer o.mu.Unlock()
	vids := map[object.VID]bool{}
	for w := range o.unflushed {
		vids[w.volume] = true
	}
	return slices.Sorted(maps.Keys(vids))
}

// Count returns how many objects there are.
func (o *Objects) Count() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.current)
}

// IDs lists the objects there are.
func (o *Objects) IDs() []object.ID {
	o.mu.Lock()
	defer o.mu.Unlock()
	var ids []object.ID
	for k := range o.current {
		ids = append(ids, k.id)
	}
	return ids
}

// In lists the objects of a policy.
func (o *Objects) In(policy object.PolicyID) []object.ID {
	o.mu.Lock()
	defer o.mu.Unlock()
	var ids []object.ID
	for k := range o.current {
		if k.policy == policy {
			ids = append(ids, k.id)
		}
	}
	return ids
}

// Put makes an object behind everybody's back, durably: for tests of leftovers.
func (o *Objects) Put(policy object.PolicyID, id object.ID, shift uint8, block uint32, p []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.change(unsynced{durable: true, key: key{policy, id}}, []change{writeBlock(key{policy, id}, shift, block, p)})
}

// Block returns what a block of an object has, nil if it is a hole or there is no object.
func (o *Objects) Block(policy object.PolicyID, id object.ID, block uint32) []byte {
	o.mu.Lock()
	defer o.mu.Unlock()
	if c := o.current[key{policy, id}]; c != nil && c.blocks[block] != nil {
		return c.blocks[block][:]
	}
	return nil
}

// Remove takes an object away behind everybody's back, durably.
func (o *Objects) Remove(policy object.PolicyID, id object.ID) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.change(unsynced{durable: true, key: key{policy, id}}, []change{remove(key{policy, id})})
}

// SetGeneration makes writes of a volume under older generations fail.
func (o *Objects) SetGeneration(vid object.VID, generation uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.generations[vid] = max(o.generations[vid], generation)
}

func (o *Objects) fault(what string, id object.ID) error {
	if o.Fault != nil {
		if err := o.Fault(what, id); err != nil {
			return err
		}
	}
	return nil
}

var names = map[object.Op]string{
	object.OpRead: "read", object.OpWrite: "write", object.OpZero: "zero", object.OpDiscard: "discard", object.OpSync: "sync",
}

// Submit implements vdi.Objects.
func (o *Objects) Submit(r *object.Request) {
	switch r.Op {
	case object.OpRead:
		o.run(func() { r.Complete(o.read(r)) })
	case object.OpSync:
		t := o.ticket()
		o.run(func() {
			err := o.sync(r, t, "")
			r.Complete(cmp.Or(err, o.tell(r, t, "")))
		})
	default:
		o.mu.Lock()
		o.held = append(o.held, r)
		o.mu.Unlock()
	}
}

func (o *Objects) run(f func()) {
	if o.Async {
		go f()
		return
	}
	f()
}

// Kick implements vdi.Objects.
func (o *Objects) Kick() {
	o.mu.Lock()
	held := o.held
	o.held = nil
	o.mu.Unlock()
	for _, r := range held {
		r.Complete(o.write(r, ""))
	}
}

func (o *Objects) read(r *object.Request) error {
	if err := o.fault("read", r.ID); err != nil {
		return err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if r.Generation != 0 {
		if err := o.fence(r.Volume, r.Generation); err != nil {
			return err
		}
	}
	c, err := o.get(r.Policy, r.ID)
	if err != nil {
		return err
	}
	if err := check(r, c.shift); err != nil {
		return err
	}
	c.read(r.Data[:r.Len], r.Off)
	return nil
}

func check(r *object.Request, shift uint8) error {
	if shift != r.SizeShift || uint64(r.Off)+uint64(r.Len) > 1<<shift {
		return fmt.Errorf("object %s of size 2^%d: request at %d+%d with size 2^%d: %w", r.ID, shift, r.Off, r.Len, r.SizeShift, object.ErrInvalid)
	}
	return nil
}

func (o *Objects) get(policy object.PolicyID, id object.ID) (*content, error) {
	if o.dead {
		return nil, object.ErrClosed
	}
	c := o.current[key{policy, id}]
	if c == nil {
		return nil, fmt.Errorf("object %s: %w", id, object.ErrNotFound)
	}
	return c, nil
}

func (c *content) read(p []byte, off uint32) {
	for len(p) > 0 {
		n := min(len(p), blockSize-int(off%blockSize))
		if b := c.blocks[off/blockSize]; b != nil {
			copy(p[:n], b[off%blockSize:])
		} else {
			clear(p[:n])
		}
		p, off = p[n:], off+uint32(n)
	}
}

func (o *Objects) ticket() ticket {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.order++
	return ticket{o.made, o.order}
}

// sync makes durable what it covers of the first changes that were made. What is done to an
// object is durable in order: an older change of an object goes with a newer one. What is lost is told by tell, when it is answered.
func (o *Objects) sync(r *object.Request, t ticket, node string) error {
	if err := o.Step(); err != nil {
		return err
	}
	if err := o.fault("sync", 0); err != nil {
		return err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.dead {
		return object.ErrClosed
	}
	all, made := r.Flags&object.FlagAll != 0, t.made
	if all && r.Generation != 0 {
		if err := o.fence(r.Volume, r.Generation); err != nil {
			return err
		}
		made = o.made // also what came before the fence, and after the request
	}
	o.syncs.Add(1)
	if !all && o.owes(r.Volume, node, t) {
		return nil // what is left is for the next one
	}
	if !all {
		maps.DeleteFunc(o.unflushed, func(w owed, _ bool) bool { return w.node == node && (r.Volume == 0 || w.volume == r.Volume) })
	}
	covers := map[key]bool{}
	for _, c := range o.pending {
		if c.number < made && (r.Volume == 0 || r.Volume == c.volume) && (all || node == c.node) {
			covers[c.key] = true
		}
	}
	var left []unsynced
	for _, c := range o.pending {
		if c.number < made && covers[c.key] {
			c.change(o.durable)
		} else {
			left = append(left, c)
		}
	}
	o.pending = left
	return nil
}

// tell fails if some of what a sync covers may be lost of what a node had made, unless that was told before it began: what is in
// doubt is found out where the sync was asked for.
func (o *Objects) tell(r *object.Request, t ticket, node string) error {
	if r.Flags&object.FlagAll != 0 {
		return nil
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	told := false
	for w, list := range o.owed {
		for i := range list {
			l := &list[i]
			if w.node != node || r.Volume != 0 && w.volume != r.Volume || !l.concerns(t) {
				continue
			}
			told = true
			if o.order++; l.told == 0 {
				l.told = o.order
			}
			if l.last >= t.made { // the rest is for who covers it
				o.owed[w] = append(o.owed[w], loss{first: t.made, last: l.last})
				l.last = t.made - 1
			}
		}
	}
	if !told {
		return nil
	}
	return fmt.Errorf("%w: the power was cut", object.ErrLost)
}

// concerns reports whether a sync is to be told.
func (l *loss) concerns(t ticket) bool { return l.first < t.made && (l.told == 0 || l.told > t.began) }

// owes reports whether a sync of a node is to be told of something.
func (o *Objects) owes(volume object.VID, node string, t ticket) bool {
	for w, list := range o.owed {
		if w.node == node && (volume == 0 || w.volume == volume) && slices.ContainsFunc(list, func(l loss) bool { return l.concerns(t) }) {
			return true
		}
	}
	return false
}

// answered is called when a node hears that it has changed something, with how often there had been a restart when that was done. What was
// lost on the way is told to syncs that begin later.
func (o *Objects) answered(volume object.VID, node string, restarts uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.restarts != restarts {
		o.made++
		o.owed[owed{volume, node}] = append(o.owed[owed{volume, node}], loss{first: o.made - 1, last: o.made - 1})
	}
}

// write carries out a request that changes an object.
func (o *Objects) write(r *object.Request, node string) error {
	if err := o.Step(); err != nil {
		return err
	}
	if err := o.fault(names[r.Op], r.ID); err != nil {
		return err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.dead {
		return object.ErrClosed
	}
	if err := o.fence(r.Volume, r.Generation); err != nil {
		return err
	}
	k := key{r.Policy, r.ID}
	c := o.current[k]
	shift := r.SizeShift
	if c != nil {
		shift = c.shift
	}
	if err := check(r, shift); err != nil {
		return err
	}
	keepAllocated := r.Op == object.OpZero && r.Flags&object.FlagNoHole != 0
	if c == nil && r.Op != object.OpWrite && !keepAllocated {
		return nil
	}
	o.change(unsynced{durable: r.Flags&object.FlagFUA != 0, key: k, volume: r.Volume, node: node}, o.changes(k, c, r, keepAllocated))
	return nil
}

// changes splits a request into blocks.
func (o *Objects) changes(k key, c *content, r *object.Request, keepAllocated bool) []change {
	var list []change
	for off, end := r.Off, r.Off+r.Len; off < end; {
		n := min(end-off, blockSize-off%blockSize)
		if n == blockSize && r.Op != object.OpWrite && !keepAllocated {
			list = append(list, punch(k, off/blockSize))
			off += n
			continue
		}
		var b [blockSize]byte
		if c != nil {
			c.read(b[:], off/blockSize*blockSize)
		}
		if r.Op == object.OpWrite {
			copy(b[off%blockSize:], r.Data[off-r.Off:][:n])
		} else {
			clear(b[off%blockSize:][:n])
		}
		list = append(list, writeBlock(k, r.SizeShift, off/blockSize, b[:]))
		off += n
	}
	return list
}

func writeBlock(k key, shift uint8, block uint32, p []byte) change {
	b := new([blockSize]byte)
	copy(b[:], p)
	return func(m image) {
		c := m[k]
		if c == nil {
			c = &content{shift, map[uint32]*[blockSize]byte{}}
			m[k] = c
		}
		c.blocks[block] = b
	}
}

func punch(k key, block uint32) change {
	return func(m image) {
		if c := m[k]; c != nil {
			delete(c.blocks, block)
		}
	}
}

func remove(k key) change {
	return func(m image) { delete(m, k) }
}

func (o *Objects) change(u unsynced, list []change) {
	if !u.durable {
		o.unflushed[owed{u.volume, u.node}] = true
	}
	for _, c := range list {
		c(o.current)
		if u.durable {
			c(o.durable)
		}
		u.change, u.number = c, o.made
		o.pending = append(o.pending, u)
		o.made++
	}
}

func (o *Objects) fence(vid object.VID, generation uint64) error {
	if vid == 0 {
		return nil
	}
	if generation < o.generations[vid] {
		return fmt.Errorf("volume %s: %w", vid, object.ErrStale)
	}
	o.generations[vid] = generation
	return nil
}

// Copy implements vdi.Objects.
func (o *Objects) Copy(_ context.Context, r object.CopyRequest) error { return o.copy(r, "") }

func (o *Objects) copy(r object.CopyRequest, node string) error {
	if err := o.Step(); err != nil {
		return err
	}
	if err := o.fault("copy", r.Dst); err != nil {
		return err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if err := o.fence(r.Volume, r.Generation); err != nil {
		return err
	}
	src, err := o.get(r.SrcPolicy, r.Src)
	if err != nil {
		return err
	}
	dst := key{r.DstPolicy, r.Dst}
	if o.current[dst] != nil {
		return nil
	}
	list := []change{func(m image) {
		if m[dst] == nil {
			m[dst] = &content{r.SizeShift, map[uint32]*[blockSize]byte{}}
		}
	}}
	for n, b := range src.blocks {
		list = append(list, writeBlock(dst, r.SizeShift, n, b[:]))
	}
	o.change(unsynced{key: dst, volume: r.Volume, node: node}, list)
	return nil
}

// Delete implements vdi.Objects.
func (o *Objects) Delete(_ context.Context, r object.DeleteRequest) error { return o.delete(r, "") }

func (o *Objects) delete(r object.DeleteRequest, node string) error {
	if err := o.Step(); err != nil {
		return err
	}
	if err := o.fault("delete", r.ID); err != nil {
		return err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.dead {
		return object.ErrClosed
	}
	if err := o.fence(r.Volume, r.Generation); err != nil {
		return err
	}
	k := key{r.Policy, r.ID}
	if o.current[k] != nil {
		o.change(unsynced{key: k, volume: r.Volume, node: node}, []change{remove(k)})
	}
	return nil
}

// Extents implements vdi.Objects.
func (o *Objects) Extents(_ context.Context, policy object.PolicyID, id object.ID, off, n uint32) ([]object.Extent, error) {
	if err := o.fault("extents", id); err != nil {
		return nil, err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	c, err := o.get(policy, id)
	if err != nil {
		return nil, err
	}
	var list []object.Extent
	for end := off + n; off < end; {
		k := min(end-off, blockSize-off%blockSize)
		hole := c.blocks[off/blockSize] == nil
		if last := len(list) - 1; last >= 0 && list[last].Hole == hole {
			list[last].Len += k
		} else {
			list = append(list, object.Extent{Off: off, Len: k, Hole: hole})
		}
		off += k
	}
	return list, nil
}

// Sums implements vdi.Objects.
func (o *Objects) Sums(_ context.Context, policy object.PolicyID, id object.ID) ([]uint64, error) {
	if err := o.fault("sums", id); err != nil {
		return nil, err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	c, err := o.get(policy, id)
	if err != nil {
		return nil, err
	}
	sums := make([]uint64, 1<<c.shift/blockSize)
	for n, b := range c.blocks {
		sums[n] = object.Sum(b[:])
	}
	return sums, nil
}

// Stat implements vdi.Objects.
func (o *Objects) Stat(_ context.Context, policy object.PolicyID, id object.ID) (object.Info, error) {
	if err := o.fault("stat", id); err != nil {
		return object.Info{}, err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	c, err := o.get(policy, id)
	if err != nil {
		return object.Info{}, err
	}
	return info(key{policy, id}, c), nil
}

func info(k key, c *content) object.Info {
	return object.Info{
		Key: object.Key{Group: object.Group{Policy: k.policy}, ID: k.id}, SizeShift: c.shift, Allocated: uint64(len(c.blocks)) * blockSize,
	}
}

// List implements vdi.Objects.
func (o *Objects) List(_ context.Context, policy object.PolicyID, fn func(object.Info) error) error {
	if err := o.fault("list", 0); err != nil {
		return err
	}
	o.mu.Lock()
	if o.dead {
		o.mu.Unlock()
		return object.ErrClosed
	}
	var list []object.Info
	for k, c := range o.current {
		if k.policy == policy {
			list = append(list, info(k, c))
		}
	}
	o.mu.Unlock()
	for _, i := range list {
		if err := fn(i); err != nil {
			return err
		}
	}
	return nil
}
