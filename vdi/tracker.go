package vdi

import (
	"sync"
	"sync/atomic"

	"sheepdog/storage/object"
)

// tracker notes which objects of a volume are changed while it is copied, also what failed and may be changed. An
// object is noted when its change has ended, before it leaves the gate: when nothing is about, all is noted.
type tracker struct {
	data []atomic.Uint64 // a bit for each index

	mu   sync.Mutex
	more map[object.ID]bool // of its map, and others
}

func newTracker(objects int64) *tracker {
	return &tracker{data: make([]atomic.Uint64, (objects+63)/64), more: map[object.ID]bool{}}
}

// touched tells who copies the volume that one of its objects was changed.
func (c *core) touched(id object.ID) {
	if t := c.tracker.Load(); t != nil {
		t.note(id)
	}
}

func (t *tracker) note(id object.ID) {
	if kind, _ := id.Kind(); kind == object.KindData && int64(id.Index()) < 64*int64(len(t.data)) {
		t.data[id.Index()/64].Or(1 << (id.Index() % 64))
		return
	}
	t.mu.Lock()
	t.more[id] = true
	t.mu.Unlock()
}

// take returns what was noted since the last call, for the vid that the volume has.
func (t *tracker) take(vid object.VID) []object.ID {
	var list []object.ID
	for i := range t.data {
		bits := t.data[i].Load()
		if bits != 0 {
			bits = t.data[i].Swap(0)
		}
		for k := range uint32(64) {
			if bits>>k&1 != 0 {
				list = append(list, object.DataID(vid, uint32(i)*64+k))
			}
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for id := range t.more {
		list = append(list, id)
	}
	clear(t.more)
	return list
}
