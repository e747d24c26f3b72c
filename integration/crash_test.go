package integration

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sheepdog/integration/client"
	"sheepdog/integration/rig"
)

// The crash tests write blocks that say which they are: the block's number and a number that grows with
// every write, and a filling that follows from both. So what is read back after a crash tells exactly
// which write it is, torn blocks show, and the model knows what may be there.

const blockSize = 4096

// content fills a block of the volume as its write number seq; seq 0 and a zeroing leave zeros.
func content(p []byte, block, seq uint64) {
	x := block*0x9e3779b97f4a7c15 ^ seq*0xbf58476d1ce4e5b9
	for i := 16; i < len(p); i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(p[i:], x)
	}
	binary.LittleEndian.PutUint64(p, block)
	binary.LittleEndian.PutUint64(p[8:], seq)
}

// seqOf tells which write a block holds, 0 for zeros; an error if it is none.
func seqOf(p []byte, block uint64) (uint64, error) {
	if allZero(p) {
		return 0, nil
	}
	seq := binary.LittleEndian.Uint64(p[8:])
	want := make([]byte, len(p))
	content(want, block, seq)
	if string(want) != string(p) {
		return 0, fmt.Errorf("block %d holds no content ever written to it (starts with %x)", block, p[:32])
	}
	return seq, nil
}

func allZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// write is one change of one block.
type write struct {
	seq  uint64
	zero bool
}

// is reports whether a block that was found to hold seq (0: zeros) shows this write.
func (w write) is(seq uint64) bool {
	if w.zero || w.seq == 0 {
		return seq == 0
	}
	return seq == w.seq
}

// model is what may be on the volume. Every block belongs to one worker, so a block has at most one
// write in flight; the mutex is for those who look from outside.
type model struct {
	mu     sync.Mutex
	done   []write   // the last write that was answered
	flight [][]write // what was sent since and not answered; it may be there or not
	begun  [][]write // while a snapshot is taken: what was in flight or begun meanwhile; else nil
}

func newModel(blocks int) *model {
	return &model{done: make([]write, blocks), flight: make([][]write, blocks)}
}

func (m *model) begin(first, n int, seq uint64, zero bool) {
	m.mu.Lock()
	for b := first; b < first+n; b++ {
		m.flight[b] = append(m.flight[b], write{seq, zero})
		if m.begun != nil {
			m.begun[b] = append(m.begun[b], write{seq, zero})
		}
	}
	m.mu.Unlock()
}

func (m *model) answered(first, n int) {
	m.mu.Lock()
	for b := first; b < first+n; b++ {
		m.done[b] = m.flight[b][len(m.flight[b])-1]
		m.flight[b] = nil
	}
	m.mu.Unlock()
}

// check verifies one block's content and takes it as the truth from here on.
func (m *model) check(p []byte, block int) error {
	seq, err := seqOf(p, uint64(block))
	if err != nil {
		return err
	}
	if m.done[block].is(seq) {
		m.flight[block] = nil
		return nil
	}
	for _, w := range m.flight[block] {
		if w.is(seq) {
			m.done[block], m.flight[block] = w, nil
			return nil
		}
	}
	return fmt.Errorf("block %d holds write %d; answered was %+v, in flight %+v", block, seq, m.done[block], m.flight[block])
}

// load writes to the volume from several workers until its connections end. Every worker has its own
// stretch of the volume. Sizes are mixed so that both write paths of the store, zeroing, discarding and
// flushing are all under way at the moment of the crash.
type load struct {
	t     *testing.T
	sheep *rig.Sheep
	model *model
	seq   atomic.Uint64
	ops   atomic.Int64
}

const (
	crashWorkers     = 8
	crashVolumeBytes = 64 << 20
	crashBlocks      = crashVolumeBytes / blockSize
)

// run returns when every worker's connection has ended.
func (l *load) run(round uint64) {
	var wg sync.WaitGroup
	for w := range crashWorkers {
		conn, err := client.Dial("tcp", l.sheep.NBD(), "crash")
		if err != nil {
			break // the moment to be killed has come early; if it is anything else, verify cannot connect either
		}
		defer conn.Close()
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(round, uint64(w)))
			buf := make([]byte, 512<<10)
			for l.step(conn, rnd, w, buf) == nil {
				l.ops.Add(1)
			}
		})
	}
	wg.Wait()
}

func (l *load) step(conn *client.Conn, rnd *rand.Rand, worker int, buf []byte) error {
	const stretch = crashBlocks / crashWorkers
	n := 1
	switch rnd.IntN(10) {
	case 0:
		n = 1 + rnd.IntN(64)
	case 1:
		n = len(buf) / blockSize
	case 2:
		return conn.Flush()
	}
	first := worker*stretch + rnd.IntN(stretch-n+1)
	seq := l.seq.Add(1)
	kind := rnd.IntN(12)
	l.model.begin(first, n, seq, kind < 2)
	off, length := uint64(first)*blockSize, uint32(n*blockSize)
	var err error
	switch {
	case kind == 0:
		err = conn.Zero(off, length, uint16(rnd.IntN(2))*client.FlagNoHole)
	case kind == 1:
		err = conn.Trim(off, length)
	default:
		for i := range n {
			content(buf[i*blockSize:(i+1)*blockSize], uint64(first+i), seq)
		}
		flags := uint16(0)
		if kind < 6 {
			flags = client.FlagFUA
		}
		err = conn.Write(buf[:length], off, flags)
	}
	if err == nil {
		l.model.answered(first, n)
		return nil
	}
	if !errors.Is(err, client.ErrGone) && !errors.Is(err, client.ESHUTDOWN) {
		l.t.Errorf("write of %d blocks at %d (kind %d): %v", n, first, kind, err)
	}
	return err
}

// verify reads the whole volume and holds it against the model.
func (l *load) verify(round int) {
	l.t.Helper()
	conn := l.sheep.Dial("crash")
	buf := make([]byte, 1<<20)
	bad := 0
	for off := 0; off < crashVolumeBytes; off += len(buf) {
		if err := conn.Read(buf, uint64(off)); err != nil {
			l.t.Fatalf("round %d: read at %d: %v", round, off, err)
		}
		for i := 0; i < len(buf); i += blockSize {
			if err := l.model.check(buf[i:i+blockSize], (off+i)/blockSize); err != nil {
				if bad++; bad <= 5 {
					l.t.Errorf("round %d: %v", round, err)
				}
			}
		}
	}
	conn.Close()
	if bad > 0 {
		l.t.Fatalf("round %d: %d blocks are wrong", round, bad)
	}
}

// crashRounds is how often the daemon is killed: dozens in `make test`, hundreds in `make soak`.
func crashRounds(usual int) int {
	if n, err := strconv.Atoi(os.Getenv("SOAK_ROUNDS")); err == nil {
		return n
	}
	return usual
}

// soaking reports whether this is `make soak`, which has time for all.
func soaking() bool { return crashRounds(0) > 0 }

// TestCrash kills the daemon with SIGKILL at random moments under load, again and again. What was
// answered is there (the operating system lives on, so more than what was flushed must be), every block is
// one of those that may be there, and no checksum complains. Some rounds take a snapshot under load: it
// must show what INV-V2 says.
func TestCrash(t *testing.T) {
	besideOthers(t)
	s := rig.Start(t, rig.Options{})
	s.Dog("vdi", "create", "crash", strconv.Itoa(crashVolumeBytes))
	l := &load{t: t, sheep: s, model: newModel(crashBlocks)}
	rounds := crashRounds(30)
	var slowest time.Duration
	for round := range rounds {
		var snap *shot
		killed := make(chan struct{})
		moment := time.Duration(20+rand.IntN(400)) * time.Millisecond
		go func() {
			defer close(killed)
			began := time.Now()
			if round%8 == 7 {
				snap = l.snapshot(fmt.Sprintf("s%d", round))
			}
			time.Sleep(moment - time.Since(began))
			s.Kill()
		}()
		l.run(uint64(round))
		<-killed
		if t.Failed() {
			return
		}
		slowest = max(slowest, s.Start())
		l.verify(round)
		if snap != nil {
			snap.verify(l)
			s.Dog("vdi", "delete", "crash", "-s", snap.tag)
		}
	}
	noComplaint(t, s)
	t.Logf("%d rounds, %d requests, slowest restart %v", rounds, l.ops.Load(), slowest)
	if limit := 5 * time.Second; soaking() && slowest > limit { // else others load the machine, and TestSnapshotOfLargeVolume measures it
		t.Errorf("a restart took %v, at most %v is allowed", slowest, limit)
	}
}

// TestStopUnderLoad stops the daemon with SIGTERM under load: it ends cleanly and nothing answered is lost.
func TestStopUnderLoad(t *testing.T) {
	besideOthers(t)
	s := rig.Start(t, rig.Options{})
	s.Dog("vdi", "create", "crash", strconv.Itoa(crashVolumeBytes))
	l := &load{t: t, sheep: s, model: newModel(crashBlocks)}
	for round := range 3 {
		stopped := make(chan struct{})
		go func() {
			defer close(stopped)
			time.Sleep(200 * time.Millisecond)
			s.Stop()
		}()
		l.run(uint64(round))
		<-stopped
		if t.Failed() {
			return
		}
		s.Start()
		l.verify(round)
	}
	noComplaint(t, s)
}

// noComplaint fails the test if the daemon saw rotten blocks.
func noComplaint(t *testing.T, s *rig.Sheep) {
	t.Helper()
	for _, line := range rig.Lines(s.Log()) {
		if strings.Contains(line, "level=DEBUG") {
			continue // that checksums were made anew after a crash is no complaint
		}
		low := strings.ToLower(line)
		if strings.Contains(low, "corrupt") || strings.Contains(low, "checksum") || strings.Contains(low, "panic") {
			t.Errorf("the daemon complained: %s", line)
		}
	}
	if r := s.DogRun("vdi", "check", "crash"); r.Code != 0 {
		t.Errorf("dog vdi check: status %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
}

// shot is a snapshot taken under load: what each block may hold in it.
type shot struct {
	tag    string
	before []write   // answered when the snapshot was asked for
	during [][]write // in flight then, or begun before it was acknowledged
}

// snapshot takes one, or returns nil if the daemon did not acknowledge it.
func (l *load) snapshot(tag string) *shot {
	m, n := l.model, &shot{tag: tag}
	m.mu.Lock()
	n.before = append(n.before, m.done...)
	m.begun = make([][]write, crashBlocks)
	for b, flight := range m.flight {
		m.begun[b] = append(m.begun[b], flight...)
	}
	m.mu.Unlock()
	r := l.sheep.DogRun("vdi", "snapshot", "crash", "-s", tag)
	m.mu.Lock()
	n.during, m.begun = m.begun, nil
	m.mu.Unlock()
	if r.Code != 0 {
		l.t.Errorf("dog vdi snapshot under load: status %d\n%s", r.Code, r.Stderr)
		return nil
	}
	return n
}

// verify holds the snapshot against INV-V2: every block shows the write that was answered when the
// snapshot was asked for, or a later one that was begun before it was acknowledged.
func (n *shot) verify(l *load) {
	l.t.Helper()
	conn := l.sheep.Dial("crash@" + n.tag)
	defer conn.Close()
	buf := make([]byte, 1<<20)
	bad := 0
	for off := 0; off < crashVolumeBytes; off += len(buf) {
		if err := conn.Read(buf, uint64(off)); err != nil {
			l.t.Fatalf("snapshot %s: read at %d: %v", n.tag, off, err)
		}
		for i := 0; i < len(buf); i += blockSize {
			block := (off + i) / blockSize
			if err := n.checkBlock(buf[i:i+blockSize], block); err != nil {
				if bad++; bad <= 5 {
					l.t.Errorf("snapshot %s: %v", n.tag, err)
				}
			}
		}
	}
	if bad > 0 {
		l.t.Fatalf("snapshot %s: %d blocks are wrong", n.tag, bad)
	}
}

func (n *shot) checkBlock(p []byte, block int) error {
	seq, err := seqOf(p, uint64(block))
	if err != nil || n.before[block].is(seq) {
		return err
	}
	for _, w := range n.during[block] {
		if w.is(seq) {
			return nil
		}
	}
	return fmt.Errorf("block %d holds write %d; before %+v, during %+v", block, seq, n.before[block], n.during[block])
}

// The model notices what it is there for: a lost write, a torn block, a block of another place, a write
// that was answered and came back in an older form; and it accepts what may be.
func TestCrashModelNotices(t *testing.T) {
	block := func(n, seq uint64) []byte {
		p := make([]byte, blockSize)
		if seq > 0 {
			content(p, n, seq)
		}
		return p
	}
	torn := append(append([]byte(nil), block(3, 7)[:512]...), block(3, 5)[512:]...)
	for _, c := range []struct {
		name string
		p    []byte
		good bool
	}{
		{"the answered write", block(3, 5), true},
		{"one in flight", block(3, 7), true},
		{"a zeroing in flight", block(3, 0), true},
		{"an older write", block(3, 4), false},
		{"one never sent", block(3, 9), false},
		{"another block's", block(4, 5), false},
		{"half of each", torn, false},
	} {
		m := newModel(8)
		m.begin(3, 1, 4, false)
		m.answered(3, 1)
		m.begin(3, 1, 5, false)
		m.answered(3, 1)
		m.begin(3, 1, 7, false)
		m.begin(3, 1, 8, true)
		if err := m.check(c.p, 3); (err == nil) != c.good {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	m := newModel(8)
	m.begin(3, 1, 5, false)
	m.answered(3, 1)
	if m.check(block(3, 0), 3) == nil {
		t.Error("a lost write was not noticed")
	}
}
