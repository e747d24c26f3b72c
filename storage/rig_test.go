package storage_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/zeebo/xxh3"

	"sheepdog/storage"
	"sheepdog/storage/disk"
	"sheepdog/storage/disk/disktest"
	"sheepdog/storage/object"
)

// patience bounds every wait for the store: what takes longer hangs.
const patience = time.Minute

// rig is a store on disks in memory, the model of what it must hold, and a source of
// random operations. All that is random comes from one seed.
type rig struct {
	t     testing.TB
	rng   *rand.Rand
	cfg   storage.Config
	disks []*disktest.Disk
	store *storage.Store
	model *model
	trace *trace
	hook  func(disktest.Op) error
	// batch is the most requests that are in flight at once.
	batch int
	// buffers are what readAll reads into: a rig and its forks are used one at a time.
	buffers *[][]byte
	// lacks counts, if it is there, the changes that failed for want of space. Only those may that need some.
	lacks *int
}

// trace keeps the last things that happened, for a failure's message.
type trace struct {
	mu    sync.Mutex
	lines []string
}

func (tr *trace) add(format string, args ...any) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	if len(tr.lines) >= 400 {
		tr.lines = append(tr.lines[:0], tr.lines[200:]...)
	}
	tr.lines = append(tr.lines, fmt.Sprintf(format, args...))
}

// Write makes trace the sink of a logger.
func (tr *trace) Write(b []byte) (int, error) {
	tr.add("log: %s", strings.TrimSpace(string(b)))
	return len(b), nil
}

func (tr *trace) String() string {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return strings.Join(tr.lines, "\n")
}

// testKeys is the universe of objects: several groups, and one large object.
func testKeys() []*testObject {
	key := func(policy object.PolicyID, p object.Partition, id object.ID) object.Key {
		return object.Key{Group: object.Group{Policy: policy, Partition: p}, ID: id}
	}
	return []*testObject{
		{key: key(1, 7, object.DataID(5, 0)), shift: 20},
		{key: key(1, 7, object.DataID(5, 1)), shift: 20},
		{key: key(1, 0xfff, object.DataID(6, 2)), shift: 20},
		{key: key(2, 0, object.NewID(object.KindMap, 5, 0)), shift: 20},
		{key: key(1, 3, object.DataID(9, 9)), shift: 23},
	}
}

// sizedKeys are three objects of one size.
func sizedKeys(shift uint8) []*testObject {
	var list []*testObject
	for i := range uint32(3) {
		key := object.Key{Group: object.Group{Policy: 1, Partition: object.Partition(i)}, ID: object.DataID(7, i)}
		list = append(list, &testObject{key: key, shift: shift})
	}
	return list
}

func newRig(t testing.TB, seed uint64, disks int) *rig {
	return newRigOf(t, seed, disks, testKeys())
}

func newRigOf(t testing.TB, seed uint64, disks int, objects []*testObject) *rig {
	r := &rig{t: t, rng: rand.New(rand.NewPCG(seed, 0)), model: newModel(objects), trace: new(trace), hook: coldReads(), batch: 6, buffers: new([][]byte)}
	for i := range disks {
		r.disks = append(r.disks, disktest.New(fmt.Sprintf("disk%d", i)))
	}
	r.cfg = storage.Config{
		Node: "node1", Cluster: "cluster1",
		LogLimit:  2 << 20,
		Reserve:   -1,
		Workers:   4,
		ScrubRate: -1,
		// Small, so that objects leave the cache.
		OpenObjects: 16,
		Checkpoint:  []time.Duration{-1, time.Millisecond, 5 * time.Millisecond}[r.rng.IntN(3)],
		SmallWrite:  []int{4 << 10, 64 << 10}[r.rng.IntN(2)],
		Logger:      slog.New(slog.NewTextHandler(r.trace, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	return r
}

// fork is a rig like this one with disks of its own: what reborn makes of each.
func (r *rig) fork(seed uint64, reborn func(i int, d *disktest.Disk) *disktest.Disk) *rig {
	f := *r
	f.rng = rand.New(rand.NewPCG(seed, 1))
	f.model = r.model.clone()
	f.store = nil
	f.disks = nil
	for i, d := range r.disks {
		f.disks = append(f.disks, reborn(i, d))
	}
	f.trace = &trace{lines: append([]string(nil), r.trace.lines...)}
	f.cfg.Logger = slog.New(slog.NewTextHandler(f.trace, &slog.HandlerOptions{Level: slog.LevelDebug}))
	return &f
}

func (r *rig) fatalf(format string, args ...any) {
	r.t.Helper()
	if file := os.Getenv("STORAGE_TRACE"); file != "" {
		_ = os.WriteFile(file, []byte(r.trace.String()), 0o600)
	}
	r.t.Fatalf(format, args...)
}

// within fails the test if fn hangs.
func (r *rig) within(what string, fn func()) {
	r.t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		fn()
	}()
	r.await(what, done)
}

func (r *rig) await(what string, done <-chan struct{}) {
	r.t.Helper()
	timeout := time.NewTimer(patience)
	defer timeout.Stop()
	select {
	case <-done:
	case <-timeout.C:
		buf := make([]byte, 1<<20)
		r.fatalf("%s hangs\n%s", what, buf[:runtime.Stack(buf, true)])
	}
}

func (r *rig) open() error {
	r.t.Helper()
	cfg := r.cfg
	for _, d := range r.disks {
		cfg.Disks = append(cfg.Disks, disk.FS(d))
		if r.hook != nil {
			d.Hook(r.hook)
		}
	}
	var err error
	r.within("Open", func() { r.store, err = storage.Open(cfg) })
	if err != nil {
		r.store = nil
	}
	return err
}

func (r *rig) mustOpen() {
	r.t.Helper()
	if err := r.open(); err != nil {
		r.fatalf("open: %v", err)
	}
}

// close ends the store, if there is one, and gives what Close said.
func (r *rig) close() (err error) {
	r.t.Helper()
	if r.store != nil {
		r.within("Close", func() { err = r.store.Close() })
		r.store = nil
	}
	return err
}

func (r *rig) mustClose() {
	r.t.Helper()
	if err := r.close(); err != nil {
		r.fatalf("close: %v", err)
	}
}

// crash cuts the power of all disks and gets rid of the store.
func (r *rig) crash() {
	r.t.Helper()
	for _, d := range r.disks {
		d.Crash()
	}
	_ = r.close()
}

func (r *rig) crashed() bool {
	for _, d := range r.disks {
		if d.Crashed() {
			return true
		}
	}
	return false
}

// do carries out requests at once: all are submitted, then kicked.
func (r *rig) do(reqs ...*object.Request) {
	r.t.Helper()
	var wg sync.WaitGroup
	wg.Add(len(reqs))
	for _, q := range reqs {
		q.Done = func(*object.Request) { wg.Done() }
	}
	for _, q := range reqs {
		r.store.Submit(q)
	}
	r.store.Kick()
	done := make(chan struct{})
	go func() {
		wg.Wait()
		close(done)
	}()
	r.await(fmt.Sprintf("request %v %+v", reqs[0].Op, reqs[0].Key()), done)
}

func (o *testObject) request(op object.Op, off, n uint32) *object.Request {
	return &object.Request{
		Op: op, Policy: o.key.Group.Policy, Partition: o.key.Group.Partition, ID: o.key.ID, SizeShift: o.shift,
		Off: off, Len: n,
	}
}

func (r *rig) sync() error {
	r.t.Helper()
	seq := r.model.seq
	q := &object.Request{Op: object.OpSync}
	r.do(q)
	r.trace.add("sync: %v", q.Err)
	if q.Err == nil {
		r.model.settle(seq)
	}
	return q.Err
}

// action is one random request with its effect on the model.
type action struct {
	req     *object.Request
	o       *testObject
	seq     uint64
	touched []*sector
	existed bool // the object, before
	grows   bool // it may need space
}

// pattern fills b with what no other write has.
func pattern(b []byte, seq uint64) {
	var word [8]byte
	for i := 0; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(word[:], seq<<24|uint64(i)/8)
		copy(b[i:], word[:])
	}
}

// span picks a range within the object: often small, often where others were.
func (r *rig) span(o *testObject, limit uint32) (off, n uint32) {
	size := uint32(1) << o.shift
	area := size
	if r.rng.IntN(3) > 0 {
		area = 128 << 10
	}
	switch r.rng.IntN(8) {
	case 0:
		n = 1 + r.rng.Uint32N(600)
	case 1, 2:
		n = 1 + r.rng.Uint32N(20000)
	case 3:
		n = limit
	default:
		n = 4096 * (1 + r.rng.Uint32N(16))
	}
	n = min(n, limit, area)
	off = r.rng.Uint32N(area - n + 1)
	if area < size && o.shift > wholeShift {
		off += r.hotspot(size-area, area)
	}
	if n%4096 == 0 && r.rng.IntN(8) > 0 {
		off &^= 4095
	}
	return off, n
}

// hotspot is one of the places of a large object where something ends and something
// else begins: regions, pages of the table, the object itself.
func (r *rig) hotspot(last, area uint32) uint32 {
	const region, page = 1024 * 4096, 504 * 4096
	spots := []uint32{0, last, region - area/2, page - area/2, last / 2, last/region*region - area/2, last/page*page - area/2}
	return min(last, spots[r.rng.IntN(len(spots))]) &^ 4095
}

// randomAction makes up a request that changes something. Its effect is in the model already.
func (r *rig) randomAction() *action {
	o := r.model.objects[r.rng.IntN(len(r.model.objects))]
	a := &action{o: o, existed: o.exists()}
	switch k := r.rng.IntN(20); {
	case k < 10:
		off, n := r.span(o, 64<<10)
		a.req = o.request(object.OpWrite, off, n)
	case k < 14:
		limit := []uint32{70000, 128 << 10, 300000, 1 << o.shift}[r.rng.IntN(4)]
		off, n := r.span(o, min(limit, 1<<20))
		a.req = o.request(object.OpWrite, off, n)
	default:
		off, n := r.span(o, []uint32{100000, 1 << o.shift}[r.rng.IntN(2)])
		a.req = o.request([]object.Op{object.OpZero, object.OpDiscard}[k%2], off, n)
		if k%2 == 0 && r.rng.IntN(2) == 0 {
			a.req.Flags |= object.FlagNoHole
			a.req.Len = min(n, 1<<wholeShift)
		}
	}
	if r.rng.IntN(5) == 0 {
		a.req.Flags |= object.FlagFUA
	}
	return a
}

// apply numbers the action and puts its effect into the model.
func (r *rig) apply(a *action) {
	m := r.model
	m.seq++
	a.seq = m.seq
	a.req.Version = object.Version{Epoch: 1, Seq: m.seq}
	if a.req.Op == object.OpWrite {
		a.req.Data = make([]byte, a.req.Len)
		if r.rng.IntN(12) > 0 {
			pattern(a.req.Data, m.seq)
		}
		if (a.req.Off|a.req.Len)%4096 == 0 && m.seq%2 == 0 {
			a.req.Sums = object.AppendSums(nil, a.req.Data)
		}
		a.touched = a.o.write(m.seq, a.req.Off, a.req.Data)
		return
	}
	a.touched = a.o.zero(m.seq, a.req.Off, a.req.Len)
	if a.req.Flags&object.FlagNoHole != 0 && a.req.Op == object.OpZero {
		a.o.setExists(m.seq, true)
	}
}

// step carries out one random operation, or several at once that do not touch the
// same sectors. It returns the error that the store gave, if any.
func (r *rig) step() error {
	r.t.Helper()
	switch k := r.rng.IntN(40); {
	case k < 4:
		return r.sync()
	case k < 6:
		return r.delete(r.model.objects[r.rng.IntN(len(r.model.objects))])
	case k < 8:
		n := min(4, len(r.model.objects)) // those of one size
		return r.copy(r.model.objects[r.rng.IntN(n)], r.model.objects[r.rng.IntN(n)])
	case k < 12:
		return r.readSome(r.model.objects[r.rng.IntN(len(r.model.objects))])
	}
	return r.changes(1 + r.rng.IntN(r.batch))
}

// changes carries out n random actions at once, with a sync among them at times.
func (r *rig) changes(n int) error {
	r.t.Helper()
	var actions []*action
	before := r.model.seq
	for range n {
		a := r.randomAction()
		if r.lacks != nil && a.req.Op == object.OpWrite && r.rng.IntN(20) == 0 { // disks fill up sooner than they are emptied
			a.req.Off, a.req.Len = 0, 1<<20
		}
		if overlaps(actions, a) {
			continue
		}
		a.grows = r.lacks != nil && r.grows(a)
		r.apply(a)
		actions = append(actions, a)
	}
	return r.carryOut(before, actions)
}

// carryOut carries out actions at once that the model has, with a sync among them at times. before is the number of the
// last change before them.
func (r *rig) carryOut(before uint64, actions []*action) error {
	r.t.Helper()
	var reqs []*object.Request
	for _, a := range actions {
		reqs = append(reqs, a.req)
	}
	var barrier *object.Request
	if r.rng.IntN(10) == 0 {
		barrier = &object.Request{Op: object.OpSync}
		reqs = append(reqs, barrier)
	}
	r.do(reqs...)
	var failure error
	var lacked []*testObject
	for _, a := range actions {
		r.trace.add("%d: %s op %d flags %d [%d,+%d): %v", a.seq, a.o.key, a.req.Op, a.req.Flags, a.req.Off, a.req.Len, a.req.Err)
		if a.grows && errors.Is(a.req.Err, object.ErrNoSpace) {
			*r.lacks++
			lacked = append(lacked, a.o)
			r.model.unsure(a)
		} else if a.req.Err != nil {
			failure = a.req.Err
			r.model.unsure(a)
		} else if a.req.Flags&object.FlagFUA != 0 {
			r.model.settleAction(a)
		}
	}
	if barrier != nil && barrier.Err == nil {
		r.model.settle(before)
	}
	if failure == nil {
		for _, o := range lacked {
			r.verifyObject(o, killed)
		}
	}
	return failure
}

func overlaps(actions []*action, a *action) bool {
	for _, b := range actions {
		if a.o == b.o && a.req.Off/512 <= (b.req.Off+b.req.Len-1)/512 && b.req.Off/512 <= (a.req.Off+a.req.Len-1)/512 {
			return true
		}
	}
	return false
}

func (r *rig) delete(o *testObject) error {
	r.t.Helper()
	m := r.model
	m.seq++
	a := &action{o: o, seq: m.seq, existed: o.exists()}
	a.touched = o.zero(m.seq, 0, 1<<o.shift)
	o.setExists(m.seq, false)
	o.floor = object.Version{}
	var err error
	r.within("Delete", func() { err = r.store.Delete(context.Background(), o.key) })
	r.trace.add("%d: %s delete: %v", a.seq, o.key, err)
	if err != nil {
		m.unsure(a)
	}
	return err
}

func (r *rig) copy(dst, src *testObject) error {
	r.t.Helper()
	m := r.model
	m.seq++
	a := &action{o: dst, seq: m.seq, existed: dst.exists()}
	want := error(nil)
	switch {
	case dst.exists():
	case !src.exists():
		want = object.ErrNotFound
	default:
		a.touched = dst.become(m.seq, src)
		dst.setExists(m.seq, true)
	}
	var err error
	r.within("Copy", func() {
		err = r.store.Copy(context.Background(), dst.key, src.key, dst.shift, object.Version{Epoch: 1, Seq: m.seq})
	})
	r.trace.add("%d: %s copy of %s: %v", a.seq, dst.key, src.key, err)
	switch {
	case errors.Is(err, want) && (want != nil || err == nil):
		return nil
	case err != nil && want == nil:
		m.unsure(a)
	case r.crashed() && err != nil:
	default:
		r.fatalf("copy of %s to %s: %v, want %v", src.key, dst.key, err, want)
	}
	return err
}

// readSome checks a random range against the newest content.
func (r *rig) readSome(o *testObject) error {
	r.t.Helper()
	off, n := r.span(o, 1<<min(o.shift, wholeShift))
	q := o.request(object.OpRead, off, n)
	q.Data = make([]byte, n)
	r.do(q)
	want := error(nil)
	if !o.exists() {
		want = object.ErrNotFound
	}
	switch {
	case q.Err != nil && r.crashed(), errors.Is(q.Err, object.ErrIO):
		return q.Err
	case !errors.Is(q.Err, want) || want == nil && q.Err != nil:
		r.fatalf("read %s [%d,+%d): %v, want %v", o.key, off, n, q.Err, want)
	case want == nil:
		if i := o.differs(q.Data, off); i >= 0 {
			r.fatalf("read %s [%d,+%d): other content at %d: %s", o.key, off, n, int(off)+i, r.explain(o, q.Data[i:], off+uint32(i)))
		}
	}
	return nil
}

// explain shows what is at a place of an object and what might be.
func (r *rig) explain(o *testObject, got []byte, off uint32) string {
	var b strings.Builder
	fmt.Fprintf(&b, "found %s", stamp(got))
	if s := o.sectors[off/512]; s != nil {
		for _, st := range s.states {
			fmt.Fprintf(&b, ", %d: %s", st.seq, stamp(st.data[off%512:]))
		}
	}
	return b.String()
}

func stamp(b []byte) string {
	if len(b) < 8 {
		return fmt.Sprintf("%x", b)
	}
	v := binary.LittleEndian.Uint64(b)
	return fmt.Sprintf("write %d word %d", v>>24, v&0xffffff)
}

// image is the content of a whole object as it was read: what no run has is zero.
type image struct {
	size uint32
	runs []imageRun // ascending
}

type imageRun struct {
	off  uint32
	data []byte
}

// at returns [off, off+n), which lies within one block.
func (m *image) at(off, n uint32) []byte {
	if data, ok := m.read(off, n); ok {
		return data
	}
	return zeroBlock[:n]
}

// read is at; ok is false if nothing was read there, as it is a hole.
func (m *image) read(off, n uint32) (data []byte, ok bool) {
	for i := range m.runs {
		if run := &m.runs[i]; off >= run.off && off-run.off < uint32(len(run.data)) {
			return run.data[off-run.off:][:n], true
		}
	}
	return nil, false
}

var zeroBlock = make([]byte, 4096)

// wholeShift is the size up to which all of an object is equally likely to be touched,
// and the most that a random request moves or stores at once: TestLargestObject has the
// longest requests there are.
const wholeShift = 23

// readShift is the size up to which readAll reads an object with one request, holes and
// all; of larger ones it reads what is said to be data.
const readShift = 22

// readAll reads a whole object; what it returns is good until the next call. ok is
// false if there is none.
func (r *rig) readAll(o *testObject) (m image, ok bool) {
	r.t.Helper()
	m.size = 1 << o.shift
	extents := []object.Extent{{Len: m.size}}
	if o.shift > readShift {
		var err error
		extents, err = r.store.Extents(context.Background(), o.key, 0, m.size)
		if errors.Is(err, object.ErrNotFound) {
			return m, false
		}
		if err != nil {
			r.fatalf("extents of %s: %v", o.key, err)
		}
	}
	for _, e := range extents {
		if e.Hole {
			continue
		}
		q := o.request(object.OpRead, e.Off, e.Len)
		q.Data = r.buffer(len(m.runs), e.Len)
		r.do(q)
		if errors.Is(q.Err, object.ErrNotFound) {
			return m, false
		}
		if q.Err != nil {
			r.fatalf("read %s: %v", o.key, q.Err)
		}
		m.runs = append(m.runs, imageRun{e.Off, q.Data})
	}
	return m, true
}

// buffer is memory for run i of an image.
func (r *rig) buffer(i int, n uint32) []byte {
	for len(*r.buffers) <= i {
		*r.buffers = append(*r.buffers, nil)
	}
	if b := *r.buffers; uint32(len(b[i])) < n {
		b[i] = make([]byte, n)
	}
	return (*r.buffers)[i][:n]
}

// fate says what the store went through, and so what it may have forgotten.
type fate int

const (
	closed fate = iota // nothing may be missing
	killed             // what was not answered may be missing
	cut                // what was not synced may be missing
)

// end has the store come to its end that way, and its disks are found again by who opens them next.
func (r *rig) end(f fate) {
	r.t.Helper()
	switch f {
	case closed:
		r.mustClose()
		r.reborn((*disktest.Disk).Restart)
	case killed:
		r.crash()
		r.reborn((*disktest.Disk).Restart)
	case cut:
		r.crash()
		s := r.rng.Uint64N(8)
		r.reborn(func(d *disktest.Disk) *disktest.Disk { return d.Reopen(s) })
	}
}

// verify checks everything against the model and makes what was found the model's content.
func (r *rig) verify(f fate) {
	r.t.Helper()
	ctx := context.Background()
	listed := map[object.Key]object.Info{}
	groups, err := r.store.Groups(ctx)
	if err != nil {
		r.fatalf("groups: %v", err)
	}
	for _, g := range groups {
		err := r.store.List(ctx, g, func(i object.Info) error {
			if _, twice := listed[i.Key]; twice || i.Key.Group != g {
				r.t.Errorf("group %s lists %s, twice or in vain", g, i.Key)
			}
			listed[i.Key] = i
			return nil
		})
		if err != nil {
			r.fatalf("list %s: %v", g, err)
		}
	}
	for _, o := range r.model.objects {
		exists := r.verifyObject(o, f)
		if _, inList := listed[o.key]; inList != exists {
			r.fatalf("%s: exists is %v, listed is %v", o.key, exists, inList)
		}
	}
}

// verifyObject is verify for one object.
func (r *rig) verifyObject(o *testObject, f fate) (exists bool) {
	r.t.Helper()
	data, exists := r.readAll(o)
	if !o.mayExist(exists, f) {
		r.fatalf("%s: exists is %v, which it cannot be: %+v", o.key, exists, o.exist)
	}
	info, err := r.store.Stat(context.Background(), o.key)
	if exists {
		if err != nil {
			r.fatalf("stat %s: %v", o.key, err)
		}
		r.checkInfo(o, info)
		r.checkSums(o, data, info)
	} else {
		if !errors.Is(err, object.ErrNotFound) {
			r.fatalf("stat %s, which does not exist: %v", o.key, err)
		}
		data.runs = nil
	}
	for at, s := range o.sectors {
		if got := data.at(at*512, 512); !s.may(got, f) {
			r.fatalf("%s sector %d: must not hold this: %s", o.key, at, r.explain(o, got, at*512))
		}
	}
	r.checkUnwritten(o, data)
	r.model.found(o, exists, data, f == cut)
	return exists
}

// checkUnwritten: what was never written is zero.
func (r *rig) checkUnwritten(o *testObject, data image) {
	r.t.Helper()
	for _, run := range data.runs {
		for b := 0; b < len(run.data); b += 4096 {
			if isZero(run.data[b:][:4096]) {
				continue
			}
			for i := b; i < b+4096; i += 512 {
				at := (run.off + uint32(i)) / 512
				if o.sectors[at] == nil && !isZero(run.data[i:][:512]) {
					r.fatalf("%s sector %d: was never written and holds %s", o.key, at, r.explain(o, run.data[i:], at*512))
				}
			}
		}
	}
}

func isZero(b []byte) bool {
	for len(b) > len(zeroBlock) {
		if !bytes.Equal(b[:len(zeroBlock)], zeroBlock) {
			return false
		}
		b = b[len(zeroBlock):]
	}
	return bytes.Equal(b, zeroBlock[:len(b)])
}

func (r *rig) checkInfo(o *testObject, info object.Info) {
	r.t.Helper()
	if info.Key != o.key || info.SizeShift != o.shift {
		r.fatalf("%s: info is %+v", o.key, info)
	}
	if info.Version.Less(o.floor) && !info.Uncertain {
		r.fatalf("%s: version %+v is older than %+v, which was durable", o.key, info.Version, o.floor)
	}
	if (object.Version{Epoch: 1, Seq: r.model.seq}).Less(info.Version) {
		r.fatalf("%s: version %+v was never given", o.key, info.Version)
	}
}

// checkSums: the table says what the content is, and the extents what the table says.
func (r *rig) checkSums(o *testObject, data image, info object.Info) {
	r.t.Helper()
	ctx := context.Background()
	sums, err := r.store.Sums(ctx, o.key)
	if err != nil || uint32(len(sums)) != data.size/4096 {
		r.fatalf("sums of %s: %d of them, %v", o.key, len(sums), err)
	}
	allocated := uint64(0)
	for b, sum := range sums {
		block, read := data.read(uint32(b)*4096, 4096)
		if sum == 0 {
			if read && !isZero(block) {
				r.fatalf("%s block %d: a hole with content", o.key, b)
			}
			continue
		}
		allocated += 4096
		if !read {
			r.fatalf("%s block %d: has a sum, and is said to be a hole", o.key, b)
		}
		want := xxh3.Hash(block)
		if want == 0 {
			want = 1
		}
		if sum != want {
			r.fatalf("%s block %d: sum %x, content has %x", o.key, b, sum, want)
		}
	}
	if info.Allocated != allocated {
		r.fatalf("%s: %d bytes are allocated, stat says %d", o.key, allocated, info.Allocated)
	}
	extents, err := r.store.Extents(ctx, o.key, 0, 1<<o.shift)
	if err != nil {
		r.fatalf("extents of %s: %v", o.key, err)
	}
	at := uint64(0)
	for _, e := range extents {
		if uint64(e.Off) != at || e.Len == 0 {
			r.fatalf("%s: extents are %v", o.key, extents)
		}
		for b := at / 4096; b < (at+uint64(e.Len)+4095)/4096; b++ {
			if (sums[b] == 0) != e.Hole {
				r.fatalf("%s block %d: hole is %v, extents %v", o.key, b, sums[b] == 0, extents)
			}
		}
		at += uint64(e.Len)
	}
	if at != uint64(data.size) {
		r.fatalf("%s: extents end at %d", o.key, at)
	}
}

// doneInFull are the tests that "make race" runs without the race detector, too.
var doneInFull = regexp.MustCompile("Crash|Model|Failing")

// hurried reports whether a test shall do less, since it runs under the race detector. Only those do that are run without it,
// too: there, what happens one after the other is tried everywhere, and here what happens at the same time at some places.
func hurried(t *testing.T) bool {
	t.Helper()
	if !doneInFull.MatchString(t.Name()) {
		t.Errorf("nobody does all of %s: \"make race\" goes by names", t.Name())
	}
	return raceDetector
}

// rounds scales the random tests: SOAK_ROUNDS multiplies what the default run does.
func rounds(n int) int {
	if s := os.Getenv("SOAK_ROUNDS"); s != "" {
		k, err := strconv.Atoi(s)
		if err == nil && k > 0 {
			return n * k
		}
	}
	return n
}

var _ io.Writer = (*trace)(nil)
