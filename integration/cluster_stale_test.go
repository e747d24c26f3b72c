package integration

import (
	"encoding/binary"
	"sync/atomic"
	"testing"
	"time"

	"sheepdog/integration/client"
	"sheepdog/integration/rig"
)

// reader looks for stale reads: a counter is written through one gateway, to many blocks in turn, and read
// through another one. A read that begins after a write was answered must see that write or a later one.
type reader struct {
	t       *testing.T
	in, out *client.Conn
	blocks  [watchedBlocks]atomic.Uint64 // what was answered, or before that what was sent
	next    uint64
	reads   int
	stop    chan struct{}
	ended   [2]chan struct{}
}

const watchedBlocks = 64 // in as many objects

func newReader(t *testing.T, f *rig.Flock, volume string, writer, through *rig.Sheep) *reader {
	t.Helper()
	f.Nodes[0].Dog("vdi", "create", volume, "256M")
	f.Know(volume)
	r := &reader{t: t, in: writer.Dial(volume), out: through.Dial(volume), stop: make(chan struct{})}
	for i := range r.blocks {
		r.write(i)
	}
	return r
}

// write reports whether it may go on.
func (r *reader) write(i int) bool {
	r.next++
	var b [blockSize]byte
	binary.BigEndian.PutUint64(b[:], r.next)
	if err := r.in.Write(b[:], uint64(i)<<22, 0); err != nil {
		r.t.Errorf("write of the counter: %v", err)
		return false
	}
	r.blocks[i].Store(r.next)
	return true
}

func (r *reader) read(i int) bool {
	var b [blockSize]byte
	want := r.blocks[i].Load()
	began := time.Now()
	if err := r.out.Read(b[:], uint64(i)<<22); err != nil {
		r.t.Errorf("read of the counter: %v", err)
		return false
	}
	if got := binary.BigEndian.Uint64(b[:]); got < want {
		r.t.Errorf("stale read: block %d holds %d, and %d was answered before the read began, %v ago", i, got, want, time.Since(began))
	}
	r.reads++
	return true
}

func (r *reader) start() {
	for k, step := range []func(int) bool{r.write, r.read} {
		r.ended[k] = make(chan struct{})
		go func() {
			defer close(r.ended[k])
			for i := 0; ; i = (i + 1) % watchedBlocks {
				select {
				case <-r.stop:
					return
				default:
				}
				if !step(i) {
					return
				}
				time.Sleep(leisure())
			}
		}()
	}
}

// end waits for both, and returns how many reads there were.
func (r *reader) end() int {
	close(r.stop)
	<-r.ended[0]
	<-r.ended[1]
	return r.reads
}

// A node that hangs and wakes answers no client with what it had: while it did not run, others took
// over from it. It is let go at moments around the end of its lease and of what the leader waits for.
func TestFlockStaleReads(t *testing.T) {
	besideOthers(t)
	f := rig.NewFlock(t, 3, 3)
	lead := f.Leader()
	victim, other := (lead+1)%3, (lead+2)%3
	hangs := []time.Duration{1900 * time.Millisecond, 2700 * time.Millisecond, 3500 * time.Millisecond}
	for range crashRounds(0) / 50 {
		hangs = append(hangs, hangs[:3]...)
	}
	r := newReader(t, f, "watched", f.Nodes[other], f.Nodes[victim])
	r.start()
	for _, hang := range hangs {
		time.Sleep(500 * time.Millisecond)
		f.Nodes[victim].Freeze()
		time.Sleep(hang)
		f.Nodes[victim].Thaw()
		time.Sleep(500 * time.Millisecond)
		f.WaitWhole(wholeLimit)
	}
	// The leader itself.
	f.Nodes[lead].Freeze()
	time.Sleep(4 * time.Second)
	f.Nodes[lead].Thaw()
	f.WaitWhole(wholeLimit)
	t.Logf("%d reads around %d pauses, none stale", r.end(), len(hangs)+1)
}
