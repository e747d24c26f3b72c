package storage_test

import (
	"math/rand/v2"
	"sync"
	"testing"

	"sheepdog/storage"
	"sheepdog/storage/disk"
	"sheepdog/storage/object"
)

// benchObjects of 4 MiB are what the benchmarks work on.
const benchObjects = 64

func benchStore(b *testing.B) *storage.Store {
	b.Helper()
	fsys, err := disk.Open(b.TempDir())
	if err != nil {
		b.Fatal(err)
	}
	s, err := storage.Open(storage.Config{Disks: []disk.FS{fsys}, Node: "n", ScrubRate: -1})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := s.Close(); err != nil {
			b.Error(err)
		}
	})
	data := make([]byte, 4<<20)
	pattern(data, 1)
	for i := range uint32(benchObjects) {
		if err := call(s, benchRequest(object.OpWrite, i, 0, data)); err != nil {
			b.Fatal(err)
		}
	}
	if err := s.Checkpoint(b.Context()); err != nil {
		b.Fatal(err)
	}
	return s
}

func benchRequest(op object.Op, i, off uint32, data []byte) *object.Request {
	id := object.DataID(1, i)
	return &object.Request{
		Op: op, ID: id, Partition: object.PartitionOf(id, 4096), SizeShift: 22,
		Off: off, Len: uint32(len(data)), Data: data, Version: object.Version{Epoch: 1, Seq: 1},
	}
}

// benchDepth runs b.N operations of n bytes with depth in flight, kicked once per batch.
func benchDepth(b *testing.B, s *storage.Store, op object.Op, flags object.Flags, n uint32, depth int, sequential bool) {
	rng := rand.New(rand.NewPCG(1, 1))
	var wg sync.WaitGroup
	var mu sync.Mutex
	var failure error
	reqs := make([]*object.Request, depth)
	for i := range reqs {
		data := make([]byte, n)
		pattern(data, uint64(i))
		reqs[i] = benchRequest(op, 0, 0, data)
		reqs[i].Flags = flags
		reqs[i].Done = func(r *object.Request) {
			if r.Err != nil {
				mu.Lock()
				failure = r.Err
				mu.Unlock()
			}
			wg.Done()
		}
	}
	per := uint32(4<<20) / n
	next := uint32(0)
	b.SetBytes(int64(n))
	b.ReportAllocs()
	b.ResetTimer()
	for left := b.N; left > 0; {
		batch := reqs[:min(depth, left)]
		wg.Add(len(batch))
		for _, r := range batch {
			at := next % (per * benchObjects)
			next++
			if !sequential {
				at = rng.Uint32N(per * benchObjects)
			}
			r.ID = object.DataID(1, at/per)
			r.Partition = object.PartitionOf(r.ID, 4096)
			r.Off = at % per * n
			s.Submit(r)
		}
		s.Kick()
		wg.Wait()
		left -= len(batch)
	}
	b.StopTimer()
	if failure != nil {
		b.Fatal(failure)
	}
}

func BenchmarkRead4k(b *testing.B) {
	benchDepth(b, benchStore(b), object.OpRead, 0, 4096, 32, false)
}

func BenchmarkWrite4kBatch32(b *testing.B) {
	benchDepth(b, benchStore(b), object.OpWrite, 0, 4096, 32, false)
}

func BenchmarkWrite4kFUA(b *testing.B) {
	benchDepth(b, benchStore(b), object.OpWrite, object.FlagFUA, 4096, 32, false)
}

func BenchmarkWrite1M(b *testing.B) {
	benchDepth(b, benchStore(b), object.OpWrite, 0, 1<<20, 4, true)
}

func BenchmarkRead1M(b *testing.B) {
	benchDepth(b, benchStore(b), object.OpRead, 0, 1<<20, 4, true)
}
