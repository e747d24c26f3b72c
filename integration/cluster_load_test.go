package integration

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sheepdog/integration/client"
	"sheepdog/integration/rig"
)

const (
	flockWorkers = 6
	flockBytes   = 48 << 20
	flockBlocks  = flockBytes / blockSize
)

// history is what may be in one block: the last write known to be durable, then all that were sent
// since. answered is the latest that the client knows to be written.
type history struct {
	writes   []uint64
	answered uint64
}

// herder is a client of a cluster: workers write, flush, and read back what they wrote. Every worker
// has blocks of its own, so that it knows what each must hold.
type herder struct {
	t       *testing.T
	volume  string
	blocks  []history
	seq     atomic.Uint64
	ops     atomic.Int64
	longest atomic.Int64 // nanoseconds, of the slowest request since the last look
	mayFail atomic.Bool  // connections may end: their gateway is being ended
	lazy    atomic.Bool  // nothing is made durable
	made    time.Time
	latest  atomic.Int64 // when the last request was begun that was answered: nanoseconds after made
	strain  *strain
	lost    int // blocks whose last answered write a failure of all nodes has taken
	stop    chan struct{}
	wg      sync.WaitGroup
}

func newHerder(t *testing.T, f *rig.Flock, volume string) *herder {
	t.Helper()
	f.Nodes[0].Dog("vdi", "create", volume, fmt.Sprint(flockBytes))
	return herderOf(t, f, volume)
}

// herderOf makes a client of a volume that nobody has written.
func herderOf(t *testing.T, f *rig.Flock, volume string) *herder {
	t.Helper()
	h := &herder{t: t, volume: volume, blocks: make([]history, flockBlocks), made: time.Now(), strain: newStrain(t)}
	for i := range h.blocks {
		h.blocks[i].writes = []uint64{0}
	}
	f.Know(volume)
	return h
}

// leisure is how long clients at work wait before their next request, which leaves the machine to those under test. What
// happens to them depends on what is under way when something fails, not on how much has been done before: make soak does more.
func leisure() time.Duration {
	if soaking() {
		return time.Millisecond
	}
	return time.Duration(1+rand.IntN(7)) * time.Millisecond
}

// start lets the workers loose on a gateway; end waits for them.
func (h *herder) start(s *rig.Sheep) {
	h.t.Helper()
	h.stop = make(chan struct{})
	for w := range flockWorkers {
		conn := s.Dial(h.volume)
		h.wg.Go(func() {
			defer conn.Close()
			rnd := rand.New(rand.NewPCG(h.seq.Load(), uint64(w)))
			for {
				select {
				case <-h.stop:
					return
				default:
				}
				began := time.Now()
				err := h.step(conn, rnd, w)
				took := int64(time.Since(began))
				raise(&h.longest, took)
				if err != nil {
					if !h.mayFail.Load() {
						h.t.Errorf("worker %d after %v: %v", w, time.Duration(took), err)
					}
					return
				}
				h.ops.Add(1)
				raise(&h.latest, int64(began.Sub(h.made)))
				time.Sleep(leisure())
			}
		})
	}
}

func (h *herder) end() {
	close(h.stop)
	h.wg.Wait()
}

func raise(v *atomic.Int64, to int64) {
	for old := v.Load(); to > old && !v.CompareAndSwap(old, to); old = v.Load() {
	}
}

// answered says how long after a moment the last request was begun that was answered so far. When the answer
// is seen says little: who asks may be kept from the processor.
func (h *herder) answered(after time.Time) time.Duration {
	return h.made.Add(time.Duration(h.latest.Load())).Sub(after)
}

// stall is the longest time a request took since the last call.
func (h *herder) stall() time.Duration { return time.Duration(h.longest.Swap(0)) }

func (h *herder) step(conn *client.Conn, rnd *rand.Rand, worker int) error {
	const stretch = flockBlocks / flockWorkers
	n := 1
	if rnd.IntN(8) == 0 {
		n = 1 + rnd.IntN(32)
	}
	first := worker*stretch + rnd.IntN(stretch-n+1)
	mine := h.blocks[worker*stretch : (worker+1)*stretch]
	buf := make([]byte, n*blockSize)
	lazy := h.lazy.Load()
	switch kind := rnd.IntN(20); {
	case kind == 0 && !lazy:
		if err := conn.Flush(); err != nil {
			return fmt.Errorf("flush: %w", err)
		}
		for i := range mine {
			mine[i].writes = append(mine[i].writes[:0], mine[i].answered)
		}
		return nil
	case kind > 0 && kind < 7:
		if err := conn.Read(buf, uint64(first)*blockSize); err != nil {
			return fmt.Errorf("read: %w", err)
		}
		return h.check(buf, first, false)
	default:
		var flags uint16
		if kind < 10 && !lazy {
			flags = client.FlagFUA
		}
		return h.write(conn, buf, first, flags)
	}
}

func (h *herder) write(conn *client.Conn, buf []byte, first int, flags uint16) error {
	seq := h.seq.Add(1)
	blocks := h.blocks[first : first+len(buf)/blockSize]
	for i := range blocks {
		content(buf[i*blockSize:(i+1)*blockSize], uint64(first+i), seq)
		blocks[i].writes = append(blocks[i].writes, seq)
	}
	if err := conn.Write(buf, uint64(first)*blockSize, flags); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	for i := range blocks {
		blocks[i].answered = seq
		if flags&client.FlagFUA != 0 {
			blocks[i].writes = append(blocks[i].writes[:0], seq)
		}
	}
	return nil
}

// check holds blocks against what they must be. After a failure of all nodes a block may hold any write
// since the last one that is durable; else nothing older than the last one answered.
func (h *herder) check(p []byte, first int, allFailed bool) error {
	for i := 0; i < len(p); i += blockSize {
		b := first + i/blockSize
		seq, err := seqOf(p[i:i+blockSize], uint64(b))
		if err != nil {
			return err
		}
		if x := &h.blocks[b]; !slices.Contains(x.writes, seq) || !allFailed && seq < x.answered {
			return fmt.Errorf("block %d holds write %d; answered %d, durable and later %v", b, seq, x.answered, x.writes)
		}
	}
	return nil
}

// verify reads the whole volume through a gateway. What it finds is the truth from there on: another
// gateway must show the same.
func (h *herder) verify(s *rig.Sheep, allFailed bool) {
	h.t.Helper()
	conn := s.Dial(h.volume)
	defer conn.Close()
	buf := make([]byte, 1<<20)
	bad := 0
	for off := 0; off < flockBytes; off += len(buf) {
		if err := conn.Read(buf, uint64(off)); err != nil {
			h.t.Fatalf("read at %d through %s: %v", off, s.Host(), err)
		}
		for i := 0; i < len(buf); i += blockSize {
			b := (off + i) / blockSize
			if err := h.check(buf[i:i+blockSize], b, allFailed); err != nil {
				if bad++; bad <= 5 {
					h.t.Errorf("through %s: %v", s.Host(), err)
				}
				continue
			}
			seq, _ := seqOf(buf[i:i+blockSize], uint64(b))
			if seq < h.blocks[b].answered {
				h.lost++
			}
			h.blocks[b] = history{writes: []uint64{seq}, answered: seq}
		}
	}
	if bad > 0 {
		h.t.Fatalf("through %s: %d blocks are wrong", s.Host(), bad)
	}
}
