package replica_test

import (
	"slices"
	"testing"

	"sheepdog/cluster/internal/replica"
	"sheepdog/storage/object"
)

// A learner is brought first what gives space back, then what it has in part, and last what is new to it. What it has no
// space for waits, and all else goes on; after longer and longer pauses one of what waits is tried, and when there is
// space for that the rest follows.
func TestLearnerWithoutSpace(t *testing.T) {
	self, other := replica.Peer{Node: 1, Incarnation: 1}, replica.Peer{Node: 2, Incarnation: 1}
	const pause = 1000
	p := replica.New(replica.Options{Self: self, AckTimeout: 3000, LearnerTimeout: pause, Resend: 20, Patience: 6000}, replica.Report{})
	p.SetLease(0, 1<<60)
	p.SetView(0, replica.View{Epoch: 1, ISR: []replica.Peer{self}, Learners: []replica.Peer{other}, MinInSync: 1})
	p.SetTight(other, true) // which keeps nobody from beginning
	p.Tick(1)
	here, there := []object.ID{1, 2, 3, 4, 5, 6}, []object.ID{4, 5, 8, 9}
	p.Asked(1, other, 1, replica.Report{}, there, nil)
	p.Listed(1, other, 1, here, here, nil)
	p.Effects()

	underway := map[object.ID]*replica.Op{}
	begin := func(now replica.Time, want ...object.ID) {
		t.Helper()
		p.Tick(now)
		p.Grant(now, 100)
		var began []object.ID
		for _, e := range p.Effects() {
			if e.Kind == replica.Repair {
				began = append(began, e.ID)
				underway[e.ID] = e.Op
			}
		}
		if !slices.Equal(began, want) {
			t.Fatalf("at %d %d are begun, not %d", now, began, want)
		}
	}
	end := func(now replica.Time, err error, ids ...object.ID) {
		for _, id := range ids {
			p.Repaired(now, underway[id], other, id, 1, err)
		}
	}
	waits := func(want bool, left int) {
		t.Helper()
		if l := p.Learning(nil); len(l) != 1 || l[0].NoSpace != want || l[0].Left != left {
			t.Fatalf("it is said to be %+v; %d are left", l, left)
		}
	}

	begin(1, 8, 9, 4, 5, 1, 2, 3, 6)
	end(2, object.ErrNoSpace, 4, 1, 2, 3)
	waits(true, 8)
	if p.Wanted() != 0 {
		t.Errorf("%d are wanted, and there is no space", p.Wanted())
	}
	end(2, nil, 8, 9, 5)
	end(2, object.ErrNoSpace, 6)
	waits(true, 5)
	begin(pause)
	begin(2+pause, 4)
	begin(2 + 2*pause)
	end(3+pause, object.ErrNoSpace, 4)
	begin(2 + 3*pause)
	begin(3+3*pause, 1)
	end(4+3*pause, nil, 1)
	waits(false, 4)
	begin(4+3*pause, 2, 3, 6, 4)
	end(5+3*pause, object.ErrNoSpace, 4)
	end(5+3*pause, nil, 2, 3, 6)
	waits(true, 1)
	begin(5+4*pause, 4)
	end(6+4*pause, nil, 4)
	waits(false, 0)
	found := false
	for _, e := range p.Effects() {
		found = found || e.Kind == replica.SyncPeer
	}
	if !found {
		t.Error("all was brought, and it is not made durable")
	}
}

// When one object does not get its space those that are new to the learner are not tried.
func TestNewObjectsWaitTogether(t *testing.T) {
	self, other := replica.Peer{Node: 1, Incarnation: 1}, replica.Peer{Node: 2, Incarnation: 1}
	p := replica.New(replica.Options{Self: self, AckTimeout: 3000, LearnerTimeout: 1000, Resend: 20, Patience: 6000}, replica.Report{})
	p.SetLease(0, 1<<60)
	p.SetView(0, replica.View{Epoch: 1, ISR: []replica.Peer{self}, Learners: []replica.Peer{other}, MinInSync: 1})
	p.Tick(1)
	here := []object.ID{1, 2, 3, 4, 5, 6}
	p.Asked(1, other, 1, replica.Report{}, []object.ID{4, 5}, nil)
	p.Listed(1, other, 1, here, here, nil)
	p.Effects()
	for _, want := range []object.ID{4, 5} {
		p.Grant(1, 1)
		e := p.Effects()
		if len(e) != 1 || e[0].ID != want {
			t.Fatalf("begun is %+v, not %d", e, want)
		}
		p.Repaired(1, e[0].Op, other, want, 1, object.ErrNoSpace)
		if p.Wanted() != int(5-want) {
			t.Fatalf("after %d, %d are wanted", want, p.Wanted())
		}
	}
}

// A learner whose disk is left tells the primary what it has when what was there is gone.
func TestLearnerIsAskedWhileItIsEmptied(t *testing.T) {
	self, other := replica.Peer{Node: 1, Incarnation: 1}, replica.Peer{Node: 2, Incarnation: 1}
	p := replica.New(replica.Options{Self: self, AckTimeout: 3000, LearnerTimeout: 1000, Resend: 20, Patience: 6000}, replica.Report{Mark: replica.Mark{Epoch: 1, Seq: 9}})
	p.SetView(0, replica.View{Epoch: 3, ISR: []replica.Peer{other}, Learners: []replica.Peer{self}, MinInSync: 1})
	p.Effects()
	p.Renounce()
	if e := p.Effects(); len(e) != 1 || e[0].Kind != replica.Purge {
		t.Fatalf("it is emptied by %+v", e)
	}
	p.AnswerAsk(other, 3, 1, "ask")
	if e := p.Effects(); len(e) != 0 {
		t.Fatalf("while it is emptied it answers %+v", e)
	}
	p.Purged(1, 3, nil)
	e := p.Effects()
	if len(e) != 1 || e[0].Kind != replica.Reply || e[0].Err != nil || e[0].Report.Mark != (replica.Mark{}) {
		t.Fatalf("when it is empty it answers %+v", e)
	}
	p.Renounce() // too late: the primary counts on what it brings
	p.Receive(other, 3, 1, object.Version{Epoch: 3, Seq: 1}, 7, replica.Mark{}, "change")
	if e := p.Effects(); len(e) != 1 || e[0].Kind != replica.Apply {
		t.Fatalf("what it is brought then begins %+v", e)
	}
}

// A learner whose disk was left is brought what it has afterwards. When others hold the partition that is removed again,
// as from anybody else, also if what was on the former disk was gone before the primary began.
func TestWhatALearnerWasBroughtAfterItsDiskWasLeftIsRemoved(t *testing.T) {
	self, other := replica.Peer{Node: 1, Incarnation: 1}, replica.Peer{Node: 2, Incarnation: 1}
	p := replica.New(replica.Options{Self: self, AckTimeout: 3000, LearnerTimeout: 1000, Resend: 20, Patience: 6000}, replica.Report{})
	p.Current()
	p.SetView(0, replica.View{Epoch: 3, ISR: []replica.Peer{other}, Learners: []replica.Peer{self}, MinInSync: 1})
	p.Renounce()
	p.Purged(1, 3, nil)
	p.AnswerAsk(other, 3, 1, "ask")
	p.Receive(other, 3, 1, object.Version{Epoch: 3, Seq: 1}, 7, replica.Mark{}, "change")
	effects := p.Effects()
	stored := effects[len(effects)-1]
	if stored.Kind != replica.Apply {
		t.Fatalf("what it is brought begins %+v", effects)
	}
	p.Stored(2, stored, nil)
	p.Effects()
	p.SetView(3, replica.View{Epoch: 4, ISR: []replica.Peer{other}, MinInSync: 1, Whole: true})
	if e := p.Effects(); len(e) != 1 || e[0].Kind != replica.Purge {
		t.Fatalf("when others hold the partition: %+v, and what was brought stays", e)
	}
}

// A change of an earlier epoch that lands when the disk was left already makes its object on the next one. That is removed, too, when
// others hold the partition.
func TestWhatLandsAfterTheDiskWasLeftIsRemoved(t *testing.T) {
	self, other := replica.Peer{Node: 1, Incarnation: 1}, replica.Peer{Node: 2, Incarnation: 1}
	p := replica.New(replica.Options{Self: self, AckTimeout: 3000, LearnerTimeout: 1000, Resend: 20, Patience: 6000}, replica.Report{})
	p.Current()
	p.SetView(0, replica.View{Epoch: 3, ISR: []replica.Peer{other, self}, MinInSync: 1})
	p.Receive(other, 3, 0, object.Version{Epoch: 3, Seq: 1}, 7, replica.Mark{}, "change")
	effects := p.Effects()
	stored := effects[len(effects)-1]
	if stored.Kind != replica.Apply {
		t.Fatalf("a change begins %+v", effects)
	}
	p.SetView(1, replica.View{Epoch: 4, ISR: []replica.Peer{other}, MinInSync: 1})
	p.Renounce()
	p.Purged(2, 4, nil)
	p.Stored(3, stored, nil)
	p.Effects()
	p.SetView(4, replica.View{Epoch: 5, ISR: []replica.Peer{other}, MinInSync: 1, Whole: true})
	if e := p.Effects(); len(e) != 1 || e[0].Kind != replica.Purge {
		t.Fatalf("when others hold the partition: %+v, and what was late stays", e)
	}
}
