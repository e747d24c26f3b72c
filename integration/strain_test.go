package integration

import (
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"
)

// strain is how long the machine itself takes for next to nothing: a nap of 10 ms and 4 KiB that are made durable, over and over.
// Requests of clients consist of such things; where each of them takes long, as on a machine that others
// keep busy, so does a request, through no fault of those under test.
type strain struct{ worst atomic.Int64 }

// newStrain measures until the test ends.
func newStrain(t *testing.T) *strain {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "strain"))
	if err != nil {
		t.Fatal(err)
	}
	s, stop, ended := new(strain), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		defer f.Close()
		const nap = 10 * time.Millisecond
		block := make([]byte, blockSize)
		for {
			began := time.Now()
			select {
			case <-stop:
				return
			case <-time.After(nap):
			}
			if _, err := f.WriteAt(block, 0); err != nil {
				t.Errorf("write to the machine's disk: %v", err)
				return
			}
			if err := f.Sync(); err != nil {
				t.Errorf("sync the machine's disk: %v", err)
				return
			}
			raise(&s.worst, int64(time.Since(began)-nap))
			select {
			case <-stop:
				return
			case <-time.After(10 * nap): // leaves the machine to those under test
			}
		}
	}()
	t.Cleanup(func() { close(stop); <-ended })
	return s
}

// longest is the longest that it took since the last call.
func (s *strain) longest() time.Duration { return time.Duration(s.worst.Swap(0)) }

// strainSteps is of how many such steps, one after the other, a request may consist that waits for a new epoch: what is
// proposed, agreed on, applied, told, settled and asked again, each of them by another process.
const strainSteps = 10
