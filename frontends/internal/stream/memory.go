package stream

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
	// SmallChunk is what every session may always have, once for requests and once
	// for replies, outside of all budgets: so small requests go on whatever others hold.
	SmallChunk = 16 << 10
	// BigChunk holds the requests of a deep queue (32 writes of 4 KiB) at once.
	BigChunk = 256 << 10
	// ChunkDataMax is the longest payload that lies in a chunk; longer ones get a buffer of their own.
	ChunkDataMax = 64 << 10
	// minLarge is the smallest class of those buffers.
	minLarge = 16 << 10
)

// Budget is the memory that all sessions of a server share, in bytes. A quarter is
// for chunks, which sessions only ever try to get; the rest is for large payloads,
// which they wait for in turn. A session that waits for a payload may hold chunks,
// but none that the payloads of others need, so they cannot wait for each other.
type Budget struct {
	chunkLimit int64
	chunks     atomic.Int64
	payloads   *semaphore.Weighted
	used       atomic.Int64 // of payloads
	evict      func()       // called while somebody waits, once per patience
	patience   time.Duration
}

// NewBudget makes a budget of limit bytes. While somebody waits for a payload's, evict is
// called once per patience: it shall end sessions that are Stalled.
func NewBudget(limit int64, patience time.Duration, evict func()) *Budget {
	return &Budget{chunkLimit: limit / 4, payloads: semaphore.NewWeighted(limit - limit/4), evict: evict, patience: patience}
}

func (b *Budget) tryChunk(n int64) bool {
	if b.chunks.Add(n) > b.chunkLimit {
		b.chunks.Add(-n)
		return false
	}
	return true
}

func (b *Budget) putChunk(n int64) { b.chunks.Add(-n) }

func (b *Budget) tryPayload(n int64) bool {
	if !b.payloads.TryAcquire(n) {
		return false
	}
	b.used.Add(n)
	return true
}

// payload waits its turn for n bytes. While it waits, sessions whose clients have
// not read their replies for long are ended.
func (b *Budget) payload(ctx context.Context, n int64) error {
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

func (b *Budget) putPayload(n int64) {
	b.used.Add(-n)
	b.payloads.Release(n)
}

// InUse returns the bytes that count against the budget now.
func (b *Budget) InUse() int64 { return b.chunks.Load() + b.used.Load() }

// Chunk is memory that many requests share: of the receive buffer, or of the arena
// of replies. It goes back to its pool when the session and all requests let go of it.
type Chunk struct {
	b     []byte
	refs  atomic.Int32
	owner *Stream
	slot  *atomic.Bool // the session's free small chunk, to be given back
	cost  int64        // else what it counts against the budgets
}

var (
	smallChunks = sync.Pool{New: func() any { return &Chunk{b: make([]byte, SmallChunk)} }}
	bigChunks   = sync.Pool{New: func() any { return &Chunk{b: make([]byte, BigChunk)} }}
)

// tryChunk gets a chunk, a big one if wanted and the budgets allow it; nil if the
// session's own small one is in use and the budgets are spent.
func (s *Stream) tryChunk(slot *atomic.Bool, big bool) *Chunk {
	if big && s.tryCharge(BigChunk) {
		return s.newChunk(&bigChunks, nil, BigChunk)
	}
	if slot.CompareAndSwap(false, true) {
		return s.newChunk(&smallChunks, slot, 0)
	}
	if !big && s.tryCharge(SmallChunk) {
		return s.newChunk(&smallChunks, nil, SmallChunk)
	}
	return nil
}

func (s *Stream) newChunk(pool *sync.Pool, slot *atomic.Bool, cost int64) *Chunk {
	c := pool.Get().(*Chunk)
	c.owner, c.slot, c.cost = s, slot, cost
	c.refs.Store(1)
	return c
}

// tryCharge takes n bytes of the session's and the server's budget for a chunk.
func (s *Stream) tryCharge(n int64) bool {
	if s.held.Add(n) > s.limit || !s.budget.tryChunk(n) {
		s.held.Add(-n)
		return false
	}
	return true
}

// Unref lets go of the chunk. From any goroutine.
func (c *Chunk) Unref() {
	if c.refs.Add(-1) > 0 {
		return
	}
	s, slot, cost := c.owner, c.slot, c.cost
	c.owner, c.slot = nil, nil
	if len(c.b) == BigChunk {
		bigChunks.Put(c)
	} else {
		smallChunks.Put(c)
	}
	if slot != nil {
		slot.Store(false)
		return
	}
	s.held.Add(-cost)
	s.budget.putChunk(cost)
}

// Large is a buffer for one long payload; its capacity is a power of two.
type Large struct{ b []byte }

var larges [bits.UintSize]sync.Pool

// LargeCost is the size of the buffer that n bytes get, which is to be charged.
func LargeCost(n int) int { return max(minLarge, 1<<bits.Len(uint(n-1))) }

// NewLarge returns a buffer for n bytes; its content is anything.
func NewLarge(n int) *Large {
	size := LargeCost(n)
	if l, ok := larges[bits.Len(uint(size))].Get().(*Large); ok {
		return l
	}
	return &Large{make([]byte, size)}
}

// Bytes is the buffer, LargeCost bytes.
func (l *Large) Bytes() []byte { return l.b }

// Free gives the buffer back.
func (l *Large) Free() { larges[bits.Len(uint(len(l.b)))].Put(l) }

// arena is where short replies put their data, each behind its head, so that the
// replies of a batch lie one after another and leave as one piece.
type arena struct {
	chunk *Chunk // nil while idle
	slot  atomic.Bool
	pos   int
	big   bool
	calm  int
}

func (a *arena) release() {
	if a.chunk != nil {
		a.chunk.Unref()
		a.chunk = nil
	}
}

// Place returns n bytes for a short reply, and what they lie in, to be let go of once it
// is sent; nil if there is no memory for it.
func (s *Stream) Place(n int) ([]byte, *Chunk) {
	a := &s.arena
	if a.chunk != nil && a.chunk.refs.Load() == 1 {
		a.pos = 0
		if a.calm++; a.calm > calmAfter {
			a.big = false
		}
	}
	if a.chunk == nil || len(a.chunk.b)-a.pos < n {
		if a.chunk != nil || n > SmallChunk {
			a.big, a.calm = true, 0
		}
		a.release()
		a.pos = 0
		c := s.tryChunk(&a.slot, a.big)
		if c == nil {
			return nil, nil
		}
		if len(c.b) < n {
			c.Unref()
			return nil, nil
		}
		a.chunk = c
	}
	p := a.chunk.b[a.pos : a.pos+n]
	a.pos += n
	a.chunk.refs.Add(1)
	return p, a.chunk
}
