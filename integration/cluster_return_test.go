package integration

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"sheepdog/integration/client"
	"sheepdog/integration/rig"
)

// A node that was away while little was written is brought about that, and not what its disk has: bytes that go over the
// network are counted by itself. One is stopped; one is killed while objects are being written directly: those that
// were under way then count, too.
func TestFlockReturnMovesWhatChanged(t *testing.T) {
	besideOthers(t)
	f := rig.NewFlock(t, 3, 3)
	f.Nodes[0].Dog("vdi", "create", "v", fmt.Sprint(returnPieces*pieceBytes))
	f.Know("v")
	conn := f.Nodes[0].Dial("v")
	for i := range uint64(returnPieces) {
		if err := conn.Write(rig.Random(i, pieceBytes), i*pieceBytes, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	stopped, killed := 5*time.Second, 15*time.Second
	if soaking() {
		stopped, killed = time.Minute, time.Minute
	}
	began := time.Now()
	f.Nodes[2].Stop()
	written := writeLightly(t, conn, began.Add(stopped))
	comeBack(t, f, 2, "SIGTERM", stopped, written)

	began = time.Now()
	written = killWhileWriting(t, f.Nodes[0], f.Nodes[1])
	written += writeLightly(t, conn, began.Add(killed))
	comeBack(t, f, 1, "kill -9", killed, written)
	checkClean(t, f.Nodes[0], "two nodes were away and came back")
}

const (
	pieceBytes   = 1 << 20
	returnPieces = 192 // what the disks have
)

// writeLightly writes some 50 blocks a second until a time, and returns how many bytes.
func writeLightly(t *testing.T, conn *client.Conn, until time.Time) (written int) {
	t.Helper()
	for ; time.Now().Before(until); time.Sleep(20 * time.Millisecond) {
		block := rand.Uint64N(returnPieces * pieceBytes / blockSize)
		if err := conn.Write(rig.Random(rand.Uint64(), blockSize), block*blockSize, client.FlagFUA*uint16(rand.IntN(2))); err != nil {
			t.Fatal(err)
		}
		written += blockSize
	}
	return written
}

// killWhileWriting kills a node while four clients of another one write pieces, and returns how much of that the
// node may have missed: all that was answered since, and what was under way.
func killWhileWriting(t *testing.T, gateway, victim *rig.Sheep) int {
	t.Helper()
	var killing, ended atomic.Bool
	var missed atomic.Int64
	var writers sync.WaitGroup
	for w := range uint64(4) {
		conn := gateway.Dial("v")
		writers.Go(func() {
			for i := w; !ended.Load(); i += 4 {
				if err := conn.Write(rig.Random(i+1, pieceBytes), i%returnPieces*pieceBytes, 0); err != nil {
					t.Errorf("write piece %d: %v", i%returnPieces, err)
					return
				}
				if killing.Load() {
					missed.Add(pieceBytes)
				}
			}
		})
	}
	time.Sleep(time.Second)
	killing.Store(true)
	victim.Kill()
	ended.Store(true)
	writers.Wait()
	return int(missed.Load())
}

// comeBack starts a node, and holds what it was brought against what was written without it.
func comeBack(t *testing.T, f *rig.Flock, i int, how string, away time.Duration, written int) {
	t.Helper()
	took := f.Back(wholeLimit, i)
	moved := int(f.Nodes[i].Metric("sheepdog_recovery_moved_bytes_total"))
	t.Logf("n%d ended by %s, away for %v: %d KiB of %d MiB were written meanwhile, %d KiB moved; whole %v after its start",
		i+1, how, away, written>>10, returnPieces*pieceBytes>>20, moved>>10, took.Round(time.Millisecond))
	if moved == 0 || moved > 2*written {
		t.Errorf("%d bytes were written while n%d was away, and %d were moved", written, i+1, moved)
	}
}
