package peer

import (
	"context"
	"math/bits"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/semaphore"
)

// Sizes of buffers, in bytes.
const (
	// smallChunk is what every connection may always have to receive into.
	smallChunk = 32 << 10
	// bigChunk takes what comes at once of a deep queue of small messages.
	bigChunk = 256 << 10
	// inPlaceMax is the longest data that stays in a chunk: a request of that length
	// still fits a small one. Longer data gets a buffer of its own.
	inPlaceMax = 16 << 10
	// minBuffer is the smallest class of those buffers.
	minBuffer = 4 << 10
)

// chunk is memory that many messages are received into at once. The receiver and each
// request whose content lies in it hold a reference.
type chunk struct {
	b     []byte
	refs  atomic.Int32
	inbox *inbox
	cost  int64 // what it counts against the budget
}

var bigChunks = sync.Pool{New: func() any { return &chunk{b: make([]byte, bigChunk)} }}

func (c *chunk) unref() {
	if c.refs.Add(-1) > 0 {
		return
	}
	in, cost := c.inbox, c.cost
	if len(c.b) == bigChunk {
		c.inbox, c.cost = nil, 0
		bigChunks.Put(c)
	}
	in.released(cost)
}

// buffer is pooled memory for the data of one message; its capacity is a power of two,
// or for the largest what MaxData needs.
type buffer struct{ b []byte }

var buffers [bits.UintSize]sync.Pool

// bufferSize is the size of the buffer that n bytes get.
func bufferSize(n int) int {
	if n > 2<<20 {
		return MaxData // the common long message is an object with its table
	}
	return max(minBuffer, 1<<bits.Len(uint(n-1)))
}

func newBuffer(n int) *buffer {
	size := bufferSize(n)
	if b, ok := buffers[bits.Len(uint(size))].Get().(*buffer); ok {
		return b
	}
	return &buffer{make([]byte, size)}
}

func (b *buffer) free() { buffers[bits.Len(uint(cap(b.b)))].Put(b) }

// budget is the memory for the requests of a class, in bytes. A quarter is for chunks,
// which connections only ever try to get; the rest is for long data and replies, which
// they wait for in turn, so that none of those who wait needs what another one waits for.
type budget struct {
	chunkLimit int64
	chunks     atomic.Int64
	data       *semaphore.Weighted
	used       atomic.Int64
	waiting    atomic.Int64 // connections that wait for data
}

func newBudget(limit int64) *budget {
	return &budget{chunkLimit: limit / 4, data: semaphore.NewWeighted(limit - limit/4)}
}

func (b *budget) tryChunk() bool {
	if b.chunks.Add(bigChunk) > b.chunkLimit {
		b.chunks.Add(-bigChunk)
		return false
	}
	return true
}

func (b *budget) tryData(n int64) bool {
	if !b.data.TryAcquire(n) {
		return false
	}
	b.used.Add(n)
	return true
}

// waitData waits its turn for n bytes.
func (b *budget) waitData(ctx context.Context, n int64) error {
	b.waiting.Add(1)
	defer b.waiting.Add(-1)
	if err := b.data.Acquire(ctx, n); err != nil {
		return err
	}
	b.used.Add(n)
	return nil
}

func (b *budget) putData(n int64) {
	b.used.Add(-n)
	b.data.Release(n)
}

// inUse is what counts against the budget now, in bytes.
func (b *budget) inUse() int64 { return b.chunks.Load() + b.used.Load() }
