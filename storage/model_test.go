package storage_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sheepdog/storage"
	"sheepdog/storage/disk"
	"sheepdog/storage/disk/disktest"
	"sheepdog/storage/object"
)

// TestModel compares long runs of random operations with the model, with closings,
// kills and power cuts in between.
func TestModel(t *testing.T) {
	t.Parallel()
	n, times := rounds(6), 8
	if hurried(t) {
		n, times = n/3, 3
	}
	for seed := range uint64(n) {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			t.Parallel()
			r := newRig(t, seed+5000, 1+int(seed%3))
			r.batch = 16
			r.mustOpen()
			for range times {
				r.work(150)
				f := fate(r.rng.IntN(3))
				r.end(f)
				r.mustOpen()
				r.verify(f)
			}
			if err := r.store.Scrub(context.Background()); err != nil {
				r.fatalf("scrub: %v", err)
			}
			r.mustClose()
		})
	}
}

// TestModelOnDirectories is TestModel on the operating system's directories.
func TestModelOnDirectories(t *testing.T) {
	r := newRig(t, 6000, 0)
	for range 2 {
		fsys, err := disk.Open(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		r.cfg.Disks = append(r.cfg.Disks, fsys)
	}
	r.mustOpen()
	for range 4 {
		r.work(100)
		r.mustClose()
		r.mustOpen()
		r.verify(closed)
	}
	r.mustClose()
}

// race is an object whose blocks are each written by one goroutine, in versions that
// grow, while everybody reads. Version v of a block is a pattern, or zeros where
// wiped(v).
type race struct {
	key           object.Key
	issued, acked []atomic.Uint64 // per block: newest version that was begun, and that was answered
}

const raceShift = 20

func wiped(v uint64) bool { return v%5 == 0 }

func newRace(id object.ID) *race {
	const blocks = 1 << raceShift / 4096
	return &race{
		key:    object.Key{Group: object.Group{Policy: 1, Partition: object.Partition(id % 4)}, ID: id},
		issued: make([]atomic.Uint64, blocks),
		acked:  make([]atomic.Uint64, blocks),
	}
}

// look begins an observation of blocks: it returns their least allowed versions.
func (x *race) look(first, n int) []uint64 {
	low := make([]uint64, n)
	for i := range low {
		low[i] = x.acked[first+i].Load()
	}
	return low
}

// check ends an observation: each block is one version between the answered one at
// the beginning and the begun one at the end.
func (x *race) check(first int, low []uint64, data []byte) error {
	for i := range low {
		b := data[i*4096:][:4096]
		high := x.issued[first+i].Load()
		v, ok := versionOf(b, first+i)
		if !ok {
			return fmt.Errorf("%s block %d: a mixture", x.key, first+i)
		}
		if v != 0 && (v < low[i] || v > high) {
			return fmt.Errorf("%s block %d: version %d is not within %d and %d", x.key, first+i, v, low[i], high)
		}
		if v == 0 && low[i] != 0 && high/5*5 < low[i] {
			return fmt.Errorf("%s block %d: zeros are not within %d and %d", x.key, first+i, low[i], high)
		}
	}
	return nil
}

// fill makes the content of version v of a block.
func fill(b []byte, block int, v uint64) { pattern(b, v<<8|uint64(block)) }

// versionOf is the reverse of fill; 0 for zeros.
func versionOf(b []byte, block int) (v uint64, ok bool) {
	if isZero(b) {
		return 0, true
	}
	want := make([]byte, len(b))
	v = leading(b) >> 32
	fill(want, block, v)
	return v, string(b) == string(want)
}

func leading(b []byte) (v uint64) {
	for i := range 8 {
		v |= uint64(b[i]) << (8 * i)
	}
	return v
}

// TestRaces lets writers, readers, syncs, copies, scrubs and the checkpoint run
// against one another.
func TestRaces(t *testing.T) {
	r := newRig(t, 7000, 2)
	r.cfg.Checkpoint = time.Millisecond
	r.cfg.SmallWrite = 64 << 10
	for _, d := range r.disks {
		d.Hook(coldReads())
	}
	r.mustOpen()
	duration := 3 * time.Second
	runRaces(t, r.store, duration*time.Duration(rounds(1)))
	r.mustClose()
}

// TestRacesOnDirectory is the same where system calls take their time.
func TestRacesOnDirectory(t *testing.T) {
	fsys, err := disk.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	s, err := storage.Open(storage.Config{
		Disks: []disk.FS{fsys}, Node: "n", LogLimit: 2 << 20, Checkpoint: 5 * time.Millisecond, ScrubRate: -1,
		Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	runRaces(t, s, 2*time.Second*time.Duration(rounds(1)))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// coldReads is a hook that lets every third read without waiting fail to find its data.
func coldReads() func(disktest.Op) error {
	var n atomic.Int64
	return func(op disktest.Op) error {
		if op.Kind == disktest.OpReadNowait && n.Add(1)%3 == 0 {
			return disk.ErrWouldBlock
		}
		return nil
	}
}

func runRaces(t *testing.T, s *storage.Store, duration time.Duration) {
	t.Helper()
	objects := []*race{newRace(1), newRace(2), newRace(3)}
	stop := make(chan struct{})
	time.AfterFunc(duration, func() { close(stop) })
	var wg sync.WaitGroup
	start := func(seed uint64, step func(rng *rand.Rand) error) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, 7))
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := step(rng); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for i, x := range objects {
		const parts = 4
		part := len(x.issued) / parts
		for p := range parts {
			start(uint64(i*10+p), func(rng *rand.Rand) error { return x.writeRandom(s, rng, p*part, part) })
		}
		start(uint64(100+i), func(rng *rand.Rand) error { return x.readRandom(s, rng) })
		start(uint64(200+i), func(rng *rand.Rand) error { return x.copyAway(s, rng, object.ID(100+i)) })
	}
	start(300, func(*rand.Rand) error { return call(s, &object.Request{Op: object.OpSync}) })
	start(301, func(*rand.Rand) error { return s.Scrub(context.Background()) })
	start(302, func(rng *rand.Rand) error { return look(s, objects[rng.IntN(len(objects))].key) })
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	(&rig{t: t, trace: new(trace)}).await("race", done)
	for _, x := range objects {
		if err := x.readAt(s, 0, len(x.issued)); err != nil {
			t.Error(err)
		}
	}
}

// call carries out one request.
func call(s *storage.Store, q *object.Request) error {
	done := make(chan struct{})
	q.Done = func(*object.Request) { close(done) }
	s.Submit(q)
	s.Kick()
	<-done
	return q.Err
}

func (x *race) request(op object.Op, first, n int) *object.Request {
	return &object.Request{
		Op: op, Policy: x.key.Group.Policy, Partition: x.key.Group.Partition, ID: x.key.ID, SizeShift: raceShift,
		Off: uint32(first) * 4096, Len: uint32(n) * 4096,
	}
}

// writeRandom writes the next version of some of the blocks [at, at+n).
func (x *race) writeRandom(s *storage.Store, rng *rand.Rand, at, n int) error {
	size := 1 + rng.IntN(3)
	if rng.IntN(4) == 0 {
		size = 17 + rng.IntN(20)
	}
	first := at + rng.IntN(n-size+1)
	v := uint64(0)
	for b := first; b < first+size; b++ {
		v = max(v, x.issued[b].Load()+1)
	}
	q := x.request(object.OpWrite, first, size)
	q.Version = object.Version{Epoch: 1, Seq: v}
	if rng.IntN(6) == 0 {
		q.Flags |= object.FlagFUA
	}
	if wiped(v) {
		q.Op = []object.Op{object.OpDiscard, object.OpZero}[rng.IntN(2)]
	} else {
		q.Data = make([]byte, size*4096)
		for i := range size {
			fill(q.Data[i*4096:][:4096], first+i, v)
		}
	}
	for b := first; b < first+size; b++ {
		x.issued[b].Store(v)
	}
	if err := call(s, q); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	for b := first; b < first+size; b++ {
		x.acked[b].Store(v)
	}
	return nil
}

func (x *race) readRandom(s *storage.Store, rng *rand.Rand) error {
	n := 1 + rng.IntN(40)
	return x.readAt(s, rng.IntN(len(x.issued)-n+1), n)
}

func (x *race) readAt(s *storage.Store, first, n int) error {
	low := x.look(first, n)
	q := x.request(object.OpRead, first, n)
	q.Data = make([]byte, n*4096)
	err := call(s, q)
	if errors.Is(err, object.ErrNotFound) {
		for i := range low {
			if low[i] != 0 && !wiped(low[i]) {
				return fmt.Errorf("%s: not there but written", x.key)
			}
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("read: %w", err)
	}
	return x.check(first, low, q.Data)
}

// copyAway copies the object, checks the copy and deletes it.
func (x *race) copyAway(s *storage.Store, rng *rand.Rand, id object.ID) error {
	ctx := context.Background()
	dst := x.key
	dst.ID = id
	low := x.look(0, len(x.issued))
	err := s.Copy(ctx, dst, x.key, raceShift, object.Version{Epoch: 1, Seq: 1})
	if errors.Is(err, object.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("copy: %w", err)
	}
	cp := &race{key: dst, issued: x.issued}
	q := cp.request(object.OpRead, 0, len(x.issued))
	q.Data = make([]byte, 1<<raceShift)
	if err := call(s, q); err != nil {
		return fmt.Errorf("read copy: %w", err)
	}
	if err := cp.check(0, low, q.Data); err != nil {
		return fmt.Errorf("copy: %w", err)
	}
	if rng.IntN(2) == 0 {
		q := cp.request(object.OpDiscard, 0, len(x.issued))
		if err := call(s, q); err != nil {
			return fmt.Errorf("discard copy: %w", err)
		}
	}
	if err := s.Delete(ctx, dst); err != nil {
		return fmt.Errorf("delete: %w", err)
	}
	if err := call(s, cp.request(object.OpRead, 0, len(x.issued))); !errors.Is(err, object.ErrNotFound) && !errors.Is(err, object.ErrInvalid) {
		return fmt.Errorf("read after delete: %w", err)
	}
	return nil
}

// look asks for all that can be known of an object.
func look(s *storage.Store, k object.Key) error {
	ctx := context.Background()
	if _, err := s.Stat(ctx, k); err != nil && !errors.Is(err, object.ErrNotFound) {
		return fmt.Errorf("stat: %w", err)
	}
	if _, err := s.Sums(ctx, k); err != nil && !errors.Is(err, object.ErrNotFound) {
		return fmt.Errorf("sums: %w", err)
	}
	if _, err := s.Extents(ctx, k, 0, 1<<raceShift); err != nil && !errors.Is(err, object.ErrNotFound) {
		return fmt.Errorf("extents: %w", err)
	}
	if err := s.List(ctx, k.Group, func(object.Info) error { return nil }); err != nil {
		return fmt.Errorf("list: %w", err)
	}
	s.Status()
	return nil
}
