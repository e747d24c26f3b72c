package catalog

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"sheepdog/storage/object"
)

// Machine applies commands one at a time. What reads may be called at any time, from any
// goroutine; what it returns stays as it was.
type Machine struct {
	mu      sync.RWMutex
	state   state
	changed func()
	changes atomic.Uint64 // commands applied, and states restored
	watch   func(VDI)
}

// New returns the machine of a cluster without VDIs.
func New() *Machine {
	m := &Machine{state: newState(), changed: func() {}, watch: func(VDI) {}}
	m.state.putting = func(v *VDI) { m.watch(*v) }
	return m
}

// Apply carries out an encoded Command and returns an encoded Result.
func (m *Machine) Apply(command []byte) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	var res Result
	defer m.changes.Add(1)
	v, err := m.state.apply(command)
	if err != nil {
		res = refusalOf(err)
	} else {
		res.VDI = v
		m.changed()
	}
	b, err := json.Marshal(res)
	if err != nil {
		panic(fmt.Sprintf("encode result: %v", err)) // a struct of numbers, strings and valid times always encodes
	}
	return b
}

// Changes grows with every change, before anybody who proposed it hears of it.
func (m *Machine) Changes() uint64 { return m.changes.Load() }

// OnChange has fn called after each change, in place of an earlier one. It is called
// with the machine locked: it must not block and must not call the machine.
func (m *Machine) OnChange(fn func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.changed = fn
}

// OnPut has fn called with each VDI as it becomes, while the command is applied that makes
// it so, and with all after Restore; in place of an earlier fn. What fn does is done
// before anybody sees that the command is applied. It must not block and must not call the machine.
func (m *Machine) OnPut(fn func(VDI)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.watch = fn
}

const snapshotFormat = 1

// saved is an encoded state; it is sorted, so that equal states have equal bytes.
type saved struct {
	Format  int          `json:"format"`
	Counter uint64       `json:"counter"`
	VDIs    []*VDI       `json:"vdis"`
	Freed   []object.VID `json:"freed"`
	Records []Record     `json:"records,omitempty"`
	// Origins are what freed vids were, by the first of these. Older versions have none.
	Origins []savedOrigin `json:"origins,omitempty"`
	// Quarantine are those of the freed vids that are in it, the longest first. Older versions have none.
	Quarantine []object.VID `json:"quarantine,omitempty"`
}

// savedOrigin is what some of the freed vids were.
type savedOrigin struct {
	Name    string       `json:"name"`
	Family  uint64       `json:"family"`
	Created int64        `json:"created"`
	VIDs    []object.VID `json:"vids"`
}

// Snapshot encodes the state.
func (m *Machine) Snapshot() ([]byte, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	s := saved{Format: snapshotFormat, Counter: m.state.counter}
	for _, v := range m.state.vdis {
		s.VDIs = append(s.VDIs, v)
	}
	slices.SortFunc(s.VDIs, func(a, b *VDI) int { return cmp.Compare(a.VID, b.VID) })
	for v := range m.state.freed {
		s.Freed = append(s.Freed, v)
	}
	slices.Sort(s.Freed)
	s.Origins = m.state.savedOrigins(s.Freed)
	for _, f := range m.state.quarantine {
		s.Quarantine = append(s.Quarantine, f.vid)
	}
	s.Records = m.state.recordsWith("")
	b, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("encode catalog: %w", err)
	}
	return b, nil
}

// savedOrigins are the origins of freed vids, which are sorted.
func (s *state) savedOrigins(freed []object.VID) []savedOrigin {
	index := map[*origin]int{}
	var list []savedOrigin
	for _, v := range freed {
		o := s.freed[v].was
		if o == nil {
			continue
		}
		i, ok := index[o]
		if !ok {
			i = len(list)
			index[o] = i
			list = append(list, savedOrigin{Name: o.Name, Family: o.Family, Created: o.Created})
		}
		list[i].VIDs = append(list[i].VIDs, v)
	}
	return list
}

// Restore replaces the state by what Snapshot encoded.
func (m *Machine) Restore(b []byte) error {
	var s saved
	if err := json.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("decode catalog: %w", err)
	}
	if s.Format != snapshotFormat {
		return fmt.Errorf("the catalog has format %d, this version knows %d: use a newer sheep", s.Format, snapshotFormat)
	}
	next := newState()
	next.counter = s.Counter
	for _, v := range s.VDIs {
		next.put(v)
	}
	for _, v := range s.Freed {
		next.setFreed(v, nil)
	}
	for _, o := range s.Origins {
		for _, v := range o.VIDs {
			if f := next.freed[v]; f != nil && f.was == nil {
				next.setFreed(v, &Origin{o.Name, o.Family, o.Created})
			}
		}
	}
	for _, v := range s.Quarantine {
		if f := next.freed[v]; f != nil && !f.quarantined {
			next.enter(f)
		}
	}
	for _, r := range s.Records {
		next.records[r.Key] = r
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	next.putting, next.maxVID = m.state.putting, m.state.maxVID
	for v := range m.state.vdis {
		if next.vdis[v] == nil {
			m.watch(VDI{Ref: Ref{VID: v}, State: Deleted})
		}
	}
	m.state = next
	defer m.changes.Add(1)
	for _, v := range s.VDIs {
		m.watch(*v)
	}
	m.changed()
	return nil
}
