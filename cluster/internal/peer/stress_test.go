package peer

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Many goroutines, all classes and lengths, deadlines, while connections break again and
// again: every call is done exactly once, what succeeds is right, and nothing is left.
func TestStress(t *testing.T) {
	modes(t, func(t *testing.T, mode func(*Config)) {
		before := runtime.NumGoroutine()
		w := network(t)
		small := func(c *Config) {
			mode(c)
			c.Memory, c.WindowCalls, c.WindowBytes, c.QueueCalls = minMemory, 16, 8<<20, 40
			c.Heartbeat, c.Silence = 50*time.Millisecond, 2*time.Second
		}
		names := []string{"a", "b", "c"}
		var all []*node
		for _, n := range names {
			all = append(all, w.start(n, small))
		}
		stop := make(chan struct{})
		var breaker sync.WaitGroup
		breaker.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				case <-time.After(40 * time.Millisecond):
				}
				x := all[i%3]
				x.Peer(names[(i+1)%3]).lanes[i%int(classes)].drop(errors.New("cut"))
			}
		})
		var good, bad, busy, late atomic.Int64
		var workers sync.WaitGroup
		for g := range 12 {
			workers.Go(func() {
				r := rand.New(rand.NewPCG(1, uint64(g)))
				for range 60 {
					x, to := all[r.IntN(3)], names[r.IntN(3)]
					p := x.Peer(to)
					var batch sync.WaitGroup
					for range 1 + r.IntN(16) {
						n := []int{0, 512, 4096, 20000, 200000}[r.IntN(5)]
						data := pattern(n, byte(r.Uint32()))
						c := &Call{Class: Class(r.IntN(int(classes))), Op: []uint16{opEcho, opLater, opSum}[r.IntN(3)], Head: data[:min(n, 30)], Data: data, Want: n}
						if r.IntN(4) == 0 {
							c.Deadline = time.Now().Add(time.Duration(r.IntN(200)) * time.Millisecond)
						}
						var once atomic.Int64
						batch.Add(1)
						c.Done = func(c *Call) {
							if once.Add(1) != 1 {
								t.Error("done twice")
								return
							}
							switch {
							case c.Err == nil && c.Op != opSum && !bytes.Equal(c.ReplyData, data):
								t.Error("other data")
							case c.Err == nil:
								good.Add(1)
							case errors.Is(c.Err, ErrBusy):
								busy.Add(1)
							case errors.Is(c.Err, ErrTimeout):
								late.Add(1)
							case errors.Is(c.Err, ErrDisconnected):
								bad.Add(1)
							default:
								t.Error(c.Err)
							}
							c.Release()
							batch.Done()
						}
						p.Submit(c)
					}
					p.Kick()
					batch.Wait()
				}
			})
		}
		workers.Wait()
		close(stop)
		breaker.Wait()
		t.Logf("%d good, %d disconnected, %d busy, %d late", good.Load(), bad.Load(), busy.Load(), late.Load())
		if good.Load() < bad.Load() || good.Load() == 0 {
			t.Error("most calls failed")
		}
		for _, x := range all {
			eventually(t, "memory is not given back", func() bool { return x.Stats().Memory == [classes]int64{} })
			for _, p := range x.Stats().Peers {
				eventually(t, "calls are left", func() bool { // late replies still come
					for _, q := range x.Stats().Peers {
						if q.Node == p.Node {
							return q.Calls == [classes]int{} && q.Bytes == [classes]int64{}
						}
					}
					return false
				})
			}
		}
		for _, x := range all {
			x.Close()
		}
		eventually(t, "goroutines are left", func() bool { return runtime.NumGoroutine() <= before+2 })
	})
}

// Close while everything is in use.
func TestCloseInUse(t *testing.T) {
	modes(t, func(t *testing.T, mode func(*Config)) {
		for range 5 {
			w := network(t)
			a, b := w.start("a", mode), w.start("b", func(c *Config) { mode(c); c.Linger = 50 * time.Millisecond })
			var submitted, done atomic.Int64
			var users sync.WaitGroup
			for range 4 {
				users.Go(func() {
					p := a.Peer("b")
					for range 300 {
						submitted.Add(1)
						p.Submit(&Call{Op: opLater, Data: make([]byte, 4096), Want: 4096, Done: func(c *Call) { done.Add(1) }})
						p.Kick()
					}
				})
			}
			time.Sleep(time.Millisecond)
			users.Go(func() { b.Close() })
			users.Go(func() { a.Close() })
			users.Wait()
			if submitted.Load() != done.Load() {
				t.Fatalf("%d calls, %d done", submitted.Load(), done.Load())
			}
		}
	})
}

// The way of a call to another node and back takes nothing from the heap.
func TestNoAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	modes(t, func(t *testing.T, mode func(*Config)) {
		w := network(t)
		a, _ := w.start("a", mode), w.start("b", mode)
		done := make(chan struct{}, 1)
		c := &Call{Op: opEcho, Head: make([]byte, 40), Data: make([]byte, 4096), ReplyData: make([]byte, 4096), Done: func(*Call) { done <- struct{}{} }}
		p := a.Peer("b")
		a.do("b", &Call{Op: opEcho})
		call := func() {
			p.Submit(c)
			p.Kick()
			<-done
		}
		if n := testing.AllocsPerRun(2000, call); n > 0.5 {
			t.Errorf("%v allocations for a call", n)
		}
	})
}
