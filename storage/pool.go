package storage

import (
	"sync"

	"sheepdog/storage/object"
)

// pool is a bounded set of goroutines that carry out what has to wait for the disk.
// The queue is bounded by the requests that the layers above have in flight.
type pool struct {
	run   func(*object.Request)
	limit int

	mu      sync.Mutex
	cond    sync.Cond
	queue   requests
	idle    int
	workers int
	closed  bool
	wg      sync.WaitGroup
}

func (p *pool) init(limit int, run func(*object.Request)) {
	p.run, p.limit = run, limit
	p.cond.L = &p.mu
}

func (p *pool) submit(r *object.Request) {
	p.mu.Lock()
	p.queue.push(r)
	p.rouse()
	p.mu.Unlock()
}

func (p *pool) submitAll(q requests) {
	for r := q.pop(); r != nil; r = q.pop() {
		p.submit(r)
	}
}

// idles reports whether nothing is being carried out.
func (p *pool) idles() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.queue.head == nil && p.idle == p.workers
}

// rouse sees to it that a worker takes what was queued. mu is held.
func (p *pool) rouse() {
	if p.idle > 0 {
		p.cond.Signal()
		return
	}
	if p.workers < p.limit {
		p.workers++
		p.wg.Add(1)
		go p.work()
	}
}

func (p *pool) work() {
	defer p.wg.Done()
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		for p.queue.head == nil {
			if p.closed {
				p.workers--
				return
			}
			p.idle++
			p.cond.Wait()
			p.idle--
		}
		r := p.queue.pop()
		p.mu.Unlock()
		p.run(r)
		p.mu.Lock()
	}
}

// close waits until the queue is empty and the workers are gone. What is submitted
// later is still carried out; another close waits for it.
func (p *pool) close() {
	p.mu.Lock()
	p.closed = true
	p.cond.Broadcast()
	p.mu.Unlock()
	p.wg.Wait()
}
