package peer

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
)

// BenchmarkEcho: writes of a size, answered without data, and reads of a size, at a
// depth, over loopback. Each kick carries what was answered since the last one.
func BenchmarkEcho(b *testing.B) {
	for _, mode := range []struct {
		name   string
		change func(*Config)
	}{{"tls", nil}, {"plain", insecure}} {
		for _, x := range []struct{ size, depth int }{{4 << 10, 1}, {4 << 10, 32}, {64 << 10, 32}, {1 << 20, 16}} {
			for _, way := range []string{"write", "read"} {
				b.Run(fmt.Sprintf("%s/%s/%dKiB/depth%d", mode.name, way, x.size>>10, x.depth), func(b *testing.B) {
					benchmark(b, mode.change, way == "read", x.size, x.depth)
				})
			}
		}
	}
}

// raw fills nothing: the transport is measured alone.
type raw struct{}

func (raw) Kick() {}
func (raw) Handle(r *Request) {
	if r.Op == opSum {
		r.ReplyData = nil
	}
	r.Reply(nil)
}

// again submits calls again in Kick, which follows a batch of Done.
type again struct {
	p    *Peer
	mu   sync.Mutex
	list []*Call
}

func (a *again) Handle(r *Request) { r.Reply(ErrUnsupported) }
func (a *again) Kick() {
	a.mu.Lock()
	for _, c := range a.list {
		a.p.Submit(c)
	}
	clear(a.list)
	a.list = a.list[:0]
	a.mu.Unlock()
	if a.p != nil {
		a.p.Kick()
	}
}

func benchmark(b *testing.B, mode func(*Config), read bool, size, depth int) {
	w := network(b)
	h := new(again)
	x := w.start("a", func(c *Config) {
		if mode != nil {
			mode(c)
		}
		c.Handler = h
	})
	w.start("b", func(c *Config) {
		if mode != nil {
			mode(c)
		}
		c.Handler = raw{}
	})
	x.do("b", &Call{Op: opSum})
	h.p = x.Peer("b")
	left := atomic.Int64{}
	left.Store(int64(b.N))
	over := make(chan struct{}, depth)
	head := make([]byte, 48)
	done := func(c *Call) {
		if c.Err != nil {
			b.Error(c.Err)
		}
		if left.Add(-1) >= 0 {
			h.mu.Lock()
			h.list = append(h.list, c)
			h.mu.Unlock()
		} else {
			over <- struct{}{}
		}
	}
	calls := make([]Call, depth)
	for i := range calls {
		c := &calls[i]
		c.Head, c.Done = head, done
		if read {
			c.Op, c.ReplyData = opRead, make([]byte, size)
		} else {
			c.Op, c.Data = opSum, make([]byte, size)
		}
	}
	b.SetBytes(int64(size))
	b.ReportAllocs()
	b.ResetTimer()
	for i := range calls {
		h.p.Submit(&calls[i])
	}
	h.p.Kick()
	for range calls {
		<-over
	}
}
