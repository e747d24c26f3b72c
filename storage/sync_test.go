package storage_test

import (
	"bytes"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"sheepdog/storage"
	"sheepdog/storage/disk/disktest"
	"sheepdog/storage/object"
)

// durable is a write that is to be durable when it is answered, and answered whether it is by the time that the kick returns.
func durable(t *testing.T, s *storage.Store, off uint32, content []byte) (answered <-chan struct{}, byKick bool) {
	t.Helper()
	q := req(object.OpWrite, 1, off, content)
	q.Flags = object.FlagFUA
	done := make(chan struct{})
	q.Done = func(q *object.Request) {
		if q.Err != nil {
			t.Error(q.Err)
		}
		close(done)
	}
	s.Submit(q)
	s.Kick()
	select {
	case <-done:
		return done, true
	default:
		return done, false
	}
}

// withObject opens a store with an object of 512 KiB of which everything is durable, and no write of which waits for a mark.
func withObject(t *testing.T, d *disktest.Disk) *storage.Store {
	t.Helper()
	s := mustOpen(t, quietConfig(d))
	q := req(object.OpWrite, 1, 0, filled(512<<10, 1))
	q.Flags = object.FlagFUA
	expect(t, "make the object", call(s, q), nil)
	return s
}

// TestQuickDiskWakesNobody: where a sync takes no longer than to wake somebody, who writes makes it durable, and is told so
// by the kick; as soon as one takes long, that is left to others, whom no kick waits for.
func TestQuickDiskWakesNobody(t *testing.T) {
	d := disktest.New("d")
	s := withObject(t, d)
	for _, size := range []int{4 << 10, 64 << 10} {
		// Once may be chance.
		for deadline, inRow := time.Now().Add(patience), 0; inRow < 20; {
			before := d.Count(disktest.OpSync)
			done, byKick := durable(t, s, 0, filled(size, 2))
			if inRow++; !byKick {
				inRow = 0
			} else if d.Count(disktest.OpSync) == before {
				t.Errorf("%d bytes were answered without a sync", size)
			}
			<-done
			if time.Now().After(deadline) { // it takes some to learn that syncs are quick, and longer on a busy machine
				t.Fatalf("writes of %d bytes are left to others", size)
			}
		}
	}

	slow := func(op disktest.Op) error {
		if op.Kind == disktest.OpSync {
			time.Sleep(time.Millisecond)
		}
		return nil
	}
	d.Hook(slow)
	done, _ := durable(t, s, 0, filled(4<<10, 3))
	<-done
	gate := make(chan struct{})
	d.Hook(func(op disktest.Op) error {
		if op.Kind == disktest.OpSync {
			<-gate
		}
		return nil
	})
	for _, size := range []int{4 << 10, 64 << 10} {
		if _, byKick := durable(t, s, 0, filled(size, 4)); byKick {
			t.Errorf("%d bytes were answered before they were durable", size)
		}
	}
	close(gate)
}

// TestSyncIsShared: long writes that become complete while something is being made durable share the next sync.
func TestSyncIsShared(t *testing.T) {
	d := disktest.New("d")
	s := withObject(t, d)
	gate, held := make(chan struct{}), make(chan struct{}, 100)
	d.Hook(func(op disktest.Op) error {
		if op.Kind == disktest.OpSync {
			held <- struct{}{}
			<-gate
		}
		return nil
	})
	before, writes := d.Count(disktest.OpSync), d.Count(disktest.OpWrite)
	first, _ := durable(t, s, 0, filled(64<<10, 2))
	<-held
	var others []<-chan struct{}
	for i := range uint32(7) {
		done, _ := durable(t, s, (i+1)*64<<10, filled(64<<10, uint64(i)+3))
		others = append(others, done)
	}
	for deadline := time.Now().Add(patience); d.Count(disktest.OpWrite) < writes+8; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the other writes wait for the first one to be durable")
		}
	}
	time.Sleep(10 * time.Millisecond) // from there to those who wait is a step that nobody sees; who is late has a sync more
	close(gate)
	<-first
	for _, done := range others {
		<-done
	}
	if n := d.Count(disktest.OpSync) - before; n > 4 {
		t.Errorf("eight writes, seven of them during the first one's sync, took %d syncs", n)
	}
	if n := d.Count(disktest.OpWrite) - writes; n != 8 {
		t.Errorf("eight writes were %d on the disk", n)
	}
}

// TestSyncsOfAllKinds: durable writes, long and short, and syncs that come at the same time are all answered, whoever
// makes them durable, and outlive a power cut.
func TestSyncsOfAllKinds(t *testing.T) {
	d := disktest.New("d")
	s := withObject(t, d)
	const writers, rounds = 8, 150
	var all sync.WaitGroup
	for w := range uint32(writers) {
		all.Go(func() {
			for round := range uint64(rounds) {
				size := []int{4 << 10, 64 << 10}[(uint64(w)+round/50)%2]
				q := req(object.OpWrite, 1, w*64<<10, filled(size, round*writers+uint64(w)))
				if q.Flags = object.FlagFUA; round%7 == 3 {
					q.Flags = 0
				}
				expect(t, "write", call(s, q), nil)
				if q.Flags == 0 {
					expect(t, "sync", call(s, &object.Request{Op: object.OpSync}), nil)
				}
			}
		})
	}
	answered := make(chan struct{})
	go func() { all.Wait(); close(answered) }()
	select {
	case <-answered:
	case <-time.After(patience):
		t.Fatal("not everything is answered")
	}
	d.Crash()
	_ = s.Close()
	s = mustOpen(t, quietConfig(d.Reopen(1)))
	for w := range uint32(writers) {
		size := []int{4 << 10, 64 << 10}[(uint64(w)+(rounds-1)/50)%2]
		got := make([]byte, size)
		expect(t, "read", call(s, req(object.OpRead, 1, w*64<<10, got)), nil)
		if !bytes.Equal(got, filled(size, (rounds-1)*writers+uint64(w))) {
			t.Errorf("the last write of %d is not what is read after a power cut", w)
		}
	}
}

// The system tells that something of a file was lost to one of those who sync it. If that is the checkpoint, who asks for what
// was written to be durable is not told that it is.
func TestSyncThatTellsOthers(t *testing.T) {
	d := disktest.New("d")
	s := withObject(t, d)
	mustCheckpoint(t, s)
	long := func(seq uint64) *object.Request { return req(object.OpWrite, 1, 0, filled(256<<10, seq)) }
	expect(t, "write", call(s, long(2)), nil)
	writing, write := make(chan struct{}), make(chan struct{})
	syncing, fail := make(chan struct{}), make(chan struct{})
	var writes, syncs atomic.Int64
	file := disktest.Named("new/*") // as which it was made, and is open
	d.Hook(func(op disktest.Op) error {
		switch {
		case op.Kind == disktest.OpWrite && file(op) && op.Off >= 1<<20 && writes.Add(1) == 1: // the table: what was in flight has been waited for
			close(writing)
			<-write
		case op.Kind == disktest.OpSync && file(op) && syncs.Add(1) == 2: // the first was for what had been written before
			close(syncing)
			<-fail
			return syscall.EIO
		}
		return nil
	})
	checkpoint := make(chan error, 1)
	go func() { checkpoint <- s.Checkpoint(t.Context()) }()
	<-writing
	expect(t, "write", call(s, long(3)), nil)
	close(write)
	<-syncing
	answer := make(chan error, 1)
	go func() { answer <- call(s, &object.Request{Op: object.OpSync}) }()
	select {
	case err := <-answer:
		t.Errorf("it is said to be durable while it is being lost: %v", err)
		answer <- err
	case <-time.After(20 * time.Millisecond): // there is no step to be seen that the sync is waited with
	}
	close(fail)
	expect(t, "sync", <-answer, object.ErrIO)
	expect(t, "checkpoint", <-checkpoint, object.ErrIO)
}
