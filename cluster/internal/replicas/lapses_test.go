package replicas

import (
	"testing"
	"time"
)

// A lease that is renewed before it ends is one; else there was a time in which others may have taken over.
func TestLapses(t *testing.T) {
	r := &Replicas{start: time.Now().Add(-time.Hour)}
	if n := r.Lapses(); n%2 != 1 {
		t.Errorf("before the first lease: %d", n)
	}
	r.SetLease(time.Now().Add(time.Hour))
	first := r.Lapses()
	r.SetLease(time.Now().Add(2 * time.Hour))
	if n := r.Lapses(); n%2 != 0 || n != first {
		t.Errorf("after a renewal %d, before it %d", n, first)
	}
	r.SetLease(time.Now().Add(-time.Second))
	if n := r.Lapses(); n%2 != 1 || n <= first {
		t.Errorf("without a lease %d, before %d", n, first)
	}
	r.SetLease(time.Now().Add(-time.Millisecond)) // asked for long ago
	r.SetLease(time.Now().Add(time.Hour))
	if n := r.Lapses(); n%2 != 0 || n == first {
		t.Errorf("with a new lease %d, with the one before %d", n, first)
	}
}
