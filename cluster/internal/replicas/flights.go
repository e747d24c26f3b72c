package replicas

import (
	"sync"

	"sheepdog/storage/object"
)

// flights counts the changes of volumes that are under way here, by generation.
type flights struct {
	mu      sync.Mutex
	count   map[flight]int
	waiting map[*landing]struct{}
}

type flight struct {
	volume     object.VID
	generation uint64
}

func (t *Task) flight() flight { return flight{t.Volume, t.Generation} }

// landing waits for the changes of older generations.
type landing struct {
	before flight
	done   chan struct{}
}

func (f *flights) began(t *Task) {
	f.mu.Lock()
	if f.count == nil {
		f.count = map[flight]int{}
	}
	f.count[t.flight()]++
	f.mu.Unlock()
}

func (f *flights) ended(k flight) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.count[k]--; f.count[k] > 0 {
		return
	}
	delete(f.count, k)
	for w := range f.waiting {
		if w.before.volume == k.volume && !f.older(w.before) {
			delete(f.waiting, w)
			close(w.done)
		}
	}
}

// older reports whether changes of older generations are under way.
func (f *flights) older(k flight) bool {
	for g := range f.count {
		if g.volume == k.volume && g.generation < k.generation {
			return true
		}
	}
	return false
}

// Landed returns a channel that is closed when no change of the volume under a generation
// older than the given one is under way on this node. No further one begins if Config.Fence
// refuses them already.
func (r *Replicas) Landed(vid object.VID, generation uint64) <-chan struct{} {
	f := &r.flights
	f.mu.Lock()
	defer f.mu.Unlock()
	w := &landing{flight{vid, generation}, make(chan struct{})}
	if !f.older(w.before) {
		close(w.done)
		return w.done
	}
	if f.waiting == nil {
		f.waiting = map[*landing]struct{}{}
	}
	f.waiting[w] = struct{}{}
	return w.done
}
