package vdi

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// One at a time has a longLock; who waits for it may give up, and who needs not wait gets it though his time is up.
func TestLongLock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l longLock
		over, cancel := context.WithCancel(context.Background())
		cancel()
		if err := l.LockWithin(over); err != nil {
			t.Fatal(err)
		}
		soon, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if err := l.LockWithin(soon); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("waiting was not given up: %v", err)
		}
		got := false
		go func() {
			l.Lock()
			got = true
			l.Unlock()
		}()
		synctest.Wait() // it counts as waiting
		if got {
			t.Error("two have the lock")
		}
		l.Unlock()
		synctest.Wait()
		if !got {
			t.Error("who waits does not get it")
		}
	})
}
