package cluster

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sheepdog/storage/object"
)

// submitter carries out requests: the store of a node that is alone, else the flock.
type submitter interface {
	Submit(*object.Request)
	Kick()
}

// delayLine holds every request for the same time before it goes on. All wait
// equally long, so they leave in the order in which they came, and one goroutine serves
// any number of them.
type delayLine struct {
	delay time.Duration
	to    submitter

	mu      sync.Mutex
	waiting []delayed
	wake    chan struct{} // buffered: waiting is no longer empty
	stop    chan struct{}
	done    chan struct{}
}

type delayed struct {
	due time.Time
	r   *object.Request
}

func newDelayLine(delay time.Duration, to submitter) *delayLine {
	d := &delayLine{delay: delay, to: to, wake: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{})}
	go d.run()
	return d
}

func (d *delayLine) submit(r *object.Request) {
	d.mu.Lock()
	d.waiting = append(d.waiting, delayed{time.Now().Add(d.delay), r})
	first := len(d.waiting) == 1
	d.mu.Unlock()
	if first {
		select {
		case d.wake <- struct{}{}:
		default:
		}
	}
}

func (d *delayLine) run() {
	defer close(d.done)
	timer := time.NewTimer(0)
	defer timer.Stop()
	var batch []*object.Request
	for {
		var next time.Time
		batch, next = d.take(batch[:0], time.Now())
		d.release(batch)
		left := time.Until(next)
		if !next.IsZero() && left <= napMost {
			nap(max(left, napLeast))
			continue
		}
		if !next.IsZero() {
			timer.Reset(left - napMost)
		}
		select {
		case <-timer.C:
		case <-d.wake:
		case <-d.stop:
			batch, _ = d.take(batch[:0], time.Now().Add(d.delay+time.Hour))
			d.release(batch)
			return
		}
	}
}

// Short waits are left to the kernel: an idle Go program wakes for its timers to the whole
// millisecond, which would make one millisecond two. What is due within napLeast of each
// other goes together, at the end of it: to wake for each costs more than the request.
const (
	napLeast = 50 * time.Microsecond
	napMost  = 2 * time.Millisecond
)

// nap sleeps for a short time, to some 50 µs. d is positive.
func nap(d time.Duration) {
	ts := unix.NsecToTimespec(int64(d))
	_ = unix.Nanosleep(&ts, nil) // a signal ends it early: then less time is left
}

// take removes what is due and tells when the next one is.
func (d *delayLine) take(batch []*object.Request, now time.Time) ([]*object.Request, time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for len(d.waiting) > 0 && !d.waiting[0].due.After(now) {
		batch = append(batch, d.waiting[0].r)
		d.waiting[0].r = nil
		d.waiting = d.waiting[1:]
	}
	if len(d.waiting) == 0 {
		return batch, time.Time{}
	}
	return batch, d.waiting[0].due
}

func (d *delayLine) release(batch []*object.Request) {
	for _, r := range batch {
		d.to.Submit(r)
	}
	if len(batch) > 0 {
		d.to.Kick()
	}
}

// close sends what is waiting to the store at once.
func (d *delayLine) close() {
	close(d.stop)
	<-d.done
}
