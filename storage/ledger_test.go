package storage_test

import (
	"bytes"
	"slices"

	"sheepdog/storage/object"
)

// model is what a store may hold. Every change has a number; of every sector and of
// every object's existence it knows each state since the newest one that is durable.
type model struct {
	seq     uint64
	objects []*testObject
}

type testObject struct {
	key     object.Key
	shift   uint8
	exist   []existence // oldest first; the last is the newest
	sectors map[uint32]*sector
	floor   object.Version // the version is at least this after a crash
	written []versionAt    // versions of writes that are not durable
}

type existence struct {
	seq    uint64
	exists bool
}

type versionAt struct {
	seq     uint64
	version object.Version
}

// sector is the row of contents that 512 bytes have had; what is durable is first.
// Contents are immutable.
type sector struct{ states []state }

type state struct {
	seq  uint64
	data []byte
}

// doubtful is the number of a change that failed and may have happened in part: no sync covers it.
const doubtful = ^uint64(0)

var zeroSector = make([]byte, 512)

func newModel(objects []*testObject) *model {
	for _, o := range objects {
		o.exist = []existence{{}}
		o.sectors = map[uint32]*sector{}
	}
	return &model{objects: objects}
}

func (m *model) clone() *model {
	cp := &model{seq: m.seq}
	for _, o := range m.objects {
		oc := *o
		oc.exist = slices.Clone(o.exist)
		oc.written = slices.Clone(o.written)
		oc.sectors = make(map[uint32]*sector, len(o.sectors))
		for at, s := range o.sectors {
			oc.sectors[at] = &sector{states: slices.Clone(s.states)}
		}
		cp.objects = append(cp.objects, &oc)
	}
	return cp
}

func (o *testObject) exists() bool { return o.exist[len(o.exist)-1].exists }

func (o *testObject) setExists(seq uint64, exists bool) {
	o.exist = append(o.exist, existence{seq, exists})
}

func (o *testObject) sector(at uint32) *sector {
	s := o.sectors[at]
	if s == nil {
		s = &sector{states: []state{{0, zeroSector}}}
		o.sectors[at] = s
	}
	return s
}

func (s *sector) newest() []byte { return s.states[len(s.states)-1].data }

// write puts data at off and returns the sectors that it touched.
func (o *testObject) write(seq uint64, off uint32, data []byte) (touched []*sector) {
	for at := off / 512; uint64(at)*512 < uint64(off)+uint64(len(data)); at++ {
		s := o.sector(at)
		content := bytes.Clone(s.newest())
		if start := int64(at)*512 - int64(off); start >= 0 {
			copy(content, data[start:])
		} else {
			copy(content[-start:], data)
		}
		s.states = append(s.states, state{seq, content})
		touched = append(touched, s)
	}
	if !o.exists() {
		o.setExists(seq, true)
	}
	o.written = append(o.written, versionAt{seq, object.Version{Epoch: 1, Seq: seq}})
	return touched
}

// zero makes [off, off+n) zero; sectors that were never written need no entry.
func (o *testObject) zero(seq uint64, off, n uint32) (touched []*sector) {
	end := uint64(off) + uint64(n)
	for at, s := range o.sectors {
		from, to := max(uint64(at)*512, uint64(off)), min(uint64(at)*512+512, end)
		if from >= to {
			continue
		}
		content := bytes.Clone(s.newest())
		clear(content[from%512 : from%512+to-from])
		s.states = append(s.states, state{seq, content})
		touched = append(touched, s)
	}
	return touched
}

// become gives the object the content that src has now.
func (o *testObject) become(seq uint64, src *testObject) (touched []*sector) {
	for at, from := range src.sectors {
		s := o.sector(at)
		s.states = append(s.states, state{seq, from.newest()})
		touched = append(touched, s)
	}
	return touched
}

// differs returns the first place where data at off is not the newest content, or -1.
func (o *testObject) differs(data []byte, off uint32) int {
	for i := 0; i < len(data); {
		at := off + uint32(i)
		in := int(at % 512)
		n := min(512-in, len(data)-i)
		want := zeroSector
		if s := o.sectors[at/512]; s != nil {
			want = s.newest()
		}
		if !bytes.Equal(data[i:i+n], want[in:in+n]) {
			for data[i] == want[in] {
				i, in = i+1, in+1
			}
			return i
		}
		i += n
	}
	return -1
}

// settle notes that everything up to a change is durable.
func (m *model) settle(seq uint64) {
	for _, o := range m.objects {
		for _, s := range o.sectors {
			s.settle(seq)
		}
		o.settle(seq)
	}
}

// settleAction notes that one change is durable.
func (m *model) settleAction(a *action) {
	for _, s := range a.touched {
		s.settle(a.seq)
	}
	if a.req.Op == object.OpWrite {
		a.o.settle(a.seq)
	}
}

func (s *sector) settle(seq uint64) {
	i := len(s.states) - 1
	for i > 0 && s.states[i].seq > seq {
		i--
	}
	s.states = s.states[i:]
}

func (o *testObject) settle(seq uint64) {
	i := len(o.exist) - 1
	for i > 0 && o.exist[i].seq > seq {
		i--
	}
	o.exist = o.exist[i:]
	for len(o.written) > 0 && o.written[0].seq <= seq {
		if len(o.exist) == 1 && o.exists() && o.written[0].seq >= o.exist[0].seq {
			o.floor = o.written[0].version
		}
		o.written = o.written[1:]
	}
}

// unsure notes that a change failed, and may have happened in part.
func (m *model) unsure(a *action) {
	for _, s := range a.touched {
		s.states[len(s.states)-1].seq = doubtful
	}
	for i := range a.o.exist {
		if a.o.exist[i].seq == a.seq {
			a.o.exist[i].seq = doubtful
		}
	}
	a.o.written = slices.DeleteFunc(a.o.written, func(v versionAt) bool { return v.seq == a.seq })
}

// allowed tells how many of the newest states of a row may be found.
// doubts is the number of newest states that are in doubt: one for each change of a
// batch that failed.
func allowed(states, doubts int, f fate) int {
	switch f {
	case cut:
		return states
	case killed:
		return min(states, 1+doubts)
	}
	return 1
}

func (o *testObject) mayExist(exists bool, f fate) bool {
	doubts := 0
	for i := len(o.exist) - 1; i >= 0 && o.exist[i].seq == doubtful; i-- {
		doubts++
	}
	for _, e := range o.exist[len(o.exist)-allowed(len(o.exist), doubts, f):] {
		if e.exists == exists {
			return true
		}
	}
	return false
}

func (s *sector) may(data []byte, f fate) bool {
	doubts := 0
	for i := len(s.states) - 1; i >= 0 && s.states[i].seq == doubtful; i-- {
		doubts++
	}
	for _, st := range slices.Backward(s.states[len(s.states)-allowed(len(s.states), doubts, f):]) {
		if bytes.Equal(st.data, data) {
			return true
		}
	}
	return false
}

// found makes what was read the newest content; with durable, also the only one
// that another power cut may leave.
func (m *model) found(o *testObject, exists bool, data image, durable bool) {
	m.seq++
	if durable {
		o.exist = o.exist[:0]
		if !exists {
			o.floor = object.Version{}
		}
		o.written = nil
	}
	if durable || o.exists() != exists {
		o.setExists(m.seq, exists)
	}
	for i := range o.exist {
		if o.exist[i].seq == doubtful {
			o.exist[i].seq = m.seq
		}
	}
	for at, s := range o.sectors {
		content := s.newest()
		if got := data.at(at*512, 512); !bytes.Equal(got, content) {
			content = bytes.Clone(got)
		}
		if durable {
			s.states = append(s.states[:0:0], state{m.seq, content})
			continue
		}
		for i := range s.states {
			if s.states[i].seq == doubtful {
				s.states[i].seq = m.seq
			}
		}
		if !bytes.Equal(content, s.newest()) {
			s.states = append(s.states, state{m.seq, content})
		}
	}
}
