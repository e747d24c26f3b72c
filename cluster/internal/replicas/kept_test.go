package replicas

import (
	"bytes"
	"errors"
	"testing"

	"sheepdog/cluster/internal/peer"
	"sheepdog/cluster/internal/replica"
	"sheepdog/cluster/state"
	"sheepdog/storage/object"
)

func keptWrite(data string) (*Forward, change) {
	f := &Forward{Task: Task{Verb: VerbWrite, ID: 7, Off: 4096, Len: uint32(len(data)), Data: []byte(data)}}
	f.content.of(f.Off, f.Data)
	return f, change{action: action{VerbWrite, 0, 22, 7, 4096, uint32(len(data)), f.content.sum}}
}

func TestKeptDataIsACopy(t *testing.T) {
	var k kept
	f, m := keptWrite("content")
	m.kept = k.keep(f)
	in := &incoming{r: &Replicas{kept: kept{forwards: k.forwards}}, req: new(peer.Request), change: m}
	if err := in.takeData(); err != nil {
		t.Fatal(err)
	}
	in.r.kept.drop(f, m.kept)
	clear(f.Data) // its owner uses the buffer again
	if string(in.data) != "content" {
		t.Errorf("kept %q", in.data)
	}
	in.leaveData()
}

// TestKeptOnlyAsLongAsItIsUnderWay: what was answered, or is another write, lends its buffer to nobody.
func TestKeptOnlyAsLongAsItIsUnderWay(t *testing.T) {
	for name, change := range map[string]func(*kept, *Forward, *change){
		"answered":     func(k *kept, f *Forward, m *change) { k.drop(f, m.kept) },
		"unknown":      func(_ *kept, _ *Forward, m *change) { m.kept++ },
		"other object": func(_ *kept, _ *Forward, m *change) { m.id++ },
		"other place":  func(_ *kept, _ *Forward, m *change) { m.off += 4096 },
		"other length": func(_ *kept, _ *Forward, m *change) { m.len-- },
		"other data":   func(_ *kept, _ *Forward, m *change) { m.sum++ },
		"overwritten":  func(_ *kept, f *Forward, _ *change) { clear(f.Data) },
	} {
		t.Run(name, func(t *testing.T) {
			r := new(Replicas)
			f, m := keptWrite("content")
			m.kept = r.kept.keep(f)
			change(&r.kept, f, &m)
			in := &incoming{r: r, req: new(peer.Request), change: m}
			if err := in.takeData(); !errors.Is(err, errNotKept) {
				t.Errorf("%v, data %q", err, in.data)
			}
		})
	}
}

// lastCall is a node that notes what it is sent.
type lastCall struct{ *peer.Call }

func (p *lastCall) Submit(c *peer.Call) { p.Call = c }
func (*lastCall) Kick()                 {}

// TestNotKeptIsSentAgain: the sender of a write is not sent its data, but for when it says that it has not
// kept it.
func TestNotKeptIsSentAgain(t *testing.T) {
	gateway, other := replica.Peer{Node: 2, Incarnation: 5}, replica.Peer{Node: 3, Incarnation: 6}
	to := new(lastCall)
	r := &Replicas{}
	r.cfg.Peer = func(state.NodeID) Peer { return to }
	task := &Task{Verb: VerbWrite, ID: 7, SizeShift: 22, Len: 4096, Data: bytes.Repeat([]byte{1}, 4096), part: newPart(r, object.Group{}), number: 11, keeper: gateway}
	decode := func() change {
		m, err := decodeChange(to.Head)
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	task.send(&replica.Effect{To: other})
	if m := decode(); m.kept != 0 || len(to.Data) != 4096 {
		t.Errorf("another node is sent %d bytes, kept %d", len(to.Data), m.kept)
	}
	task.send(&replica.Effect{To: gateway})
	first := decode()
	if first.kept != 11 || len(to.Data) != 0 {
		t.Errorf("the sender is sent %d bytes, kept %d", len(to.Data), first.kept)
	}
	to.Err = errNotKept
	to.Done(to.Call)
	first.kept = 0
	if m := decode(); m != first || len(to.Data) != 4096 {
		t.Errorf("the sender is sent %d bytes, %+v, then; want all, %+v", len(to.Data), m, first)
	}
}
