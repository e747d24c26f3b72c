package nbd

import (
	"context"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
)

// Sizes of buffers, in bytes.
const (
	// smallChunk is what every session may always have, once for requests and once
	// for replies, outside of all budgets: so small requests go on whatever others hold.
	smallChunk = 16 << 10
	// bigChunk holds the requests of a deep queue (32 writes of 4 KiB) at once.
	bigChunk = 256 << 10
	// chunkDataMax is the longest payload that lies in a chunk; longer ones get a buffer of their own.
	chunkDataMax = 64 << 10
	// minLarge and maxLarge are the smallest and the largest class of those buffers.
	minLarge = 16 << 10
	maxLarge = MaxPayload
)

// budget is the memory that all sessions of a server share, in bytes. A quarter is
// for chunks, which sessions only ever try to get; the rest is for large payloads,
// which they wait for in turn. A session that waits for a payload may hold chunks,
// but none that the payloads of others need, so they cannot wait for each other.
type budget struct {
	chunkLimit int64
	chunks     atomic.Int64
	payloads   *semaphore.Weighted
	used       atomic.Int64 // of payloads
	evict      func()       // called while somebody waits, once per patience
	patience   time.Duration
}

func newBudget(limit int64, patience time.Duration, evict func()) *budget {
	return &budget{chunkLimit: limit / 4, payloads: semaphore.NewWeighted(limit - limit/4), evict: evict, patience: patience}
}

func (b *budget) tryChunk(n int64) bool {
	if b.chunks.Add(n) > b.chunkLimit {
		b.chunks.Add(-n)
		return false
	}
	return true
}

func (b *budget) putChunk(n int64) { b.chunks.Add(-n) }

func (b *budget) tryPayload(n int64) bool {
	if !b.payloads.TryAcquire(n) {
		return false
	}
	b.used.Add(n)
	return true
}

// payload waits its turn for n bytes. While it waits, sessions whose clients have
// not read their replies for long are ended.
func (b *budget) payload(ctx context.Context, n int64) error {
	stop := make(chan struct{})
	var watch sync.WaitGroup
	watch.Go(func() {
		tick := time.NewTicker(b.patience)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				b.evict()
			case <-stop:
				return
			}
		}
	})
	err := b.payloads.Acquire(ctx, n)
	close(stop)
	watch.Wait()
	if err == nil {
		b.used.Add(n)
	}
	return err
}

func (b *budget) putPayload(n int64) {
	b.used.Add(-n)
	b.payloads.Release(n)
}

// inUse returns the bytes that count against the budget now.
func (b *budget) inUse() int64 { return b.chunks.Load() + b.used.Load() }

// chunk is memory that many requests share: of the receive buffer, or of the arena
// of replies. It goes back to its pool when the session and all requests let go of it.
type chunk struct {
	b     []byte
	refs  atomic.Int32
	owner *session
	slot  *atomic.Bool // the session's free small chunk, to be given back
	cost  int64        // else what it counts against the budgets
}

var (
	smallChunks = sync.Pool{New: func() any { return &chunk{b: make([]byte, smallChunk)} }}
	bigChunks   = sync.Pool{New: func() any { return &chunk{b: make([]byte, bigChunk)} }}
)

// tryChunk gets a chunk, a big one if wanted and the budgets allow it; nil if the
// session's own small one is in use and the budgets are spent.
func (s *session) tryChunk(slot *atomic.Bool, big bool) *chunk {
	if big && s.tryCharge(bigChunk) {
		return s.newChunk(&bigChunks, nil, bigChunk)
	}
	if slot.CompareAndSwap(false, true) {
		return s.newChunk(&smallChunks, slot, 0)
	}
	if !big && s.tryCharge(smallChunk) {
		return s.newChunk(&smallChunks, nil, smallChunk)
	}
	return nil
}

func (s *session) newChunk(pool *sync.Pool, slot *atomic.Bool, cost int64) *chunk {
	c := pool.Get().(*chunk)
	c.owner, c.slot, c.cost = s, slot, cost
	c.refs.Store(1)
	return c
}

// tryCharge takes n bytes of the session's and the server's budget for a chunk.
func (s *session) tryCharge(n int64) bool {
	if s.held.Add(n) > s.server.cfg.SessionMemory || !s.server.budget.tryChunk(n) {
		s.held.Add(-n)
		return false
	}
	return true
}

func (c *chunk) unref() {
	if c.refs.Add(-1) > 0 {
		return
	}
	s, slot, cost := c.owner, c.slot, c.cost
	c.owner, c.slot = nil, nil
	if len(c.b) == bigChunk {
		bigChunks.Put(c)
	} else {
		smallChunks.Put(c)
	}
	if slot != nil {
		slot.Store(false)
		return
	}
	s.held.Add(-cost)
	s.server.budget.putChunk(cost)
}

// large is a buffer for one long payload; its capacity is a power of two.
type large struct{ b []byte }

var larges [bits.UintSize]sync.Pool

// largeClass is the size of the buffer that n bytes get.
func largeClass(n int) int { return max(minLarge, 1<<bits.Len(uint(n-1))) }

func newLarge(n int) *large {
	size := largeClass(n)
	if l, ok := larges[bits.Len(uint(size))].Get().(*large); ok {
		return l
	}
	return &large{make([]byte, size)}
}

func (l *large) free() { larges[bits.Len(uint(len(l.b)))].Put(l) }
