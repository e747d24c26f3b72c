package replicas

import (
	"testing"

	"sheepdog/cluster/internal/replica"
	"sheepdog/storage/object"
)

// As long as an object is being made anew because it was rotten, no mark is kept that says that it is
// there: after a crash the partition is compared in full.
func TestNoMarkOverDamage(t *testing.T) {
	whole, hurt := object.Group{Policy: 1, Partition: 1}, object.Group{Policy: 1, Partition: 2}
	key := object.Key{Group: hurt, ID: 7}
	var r Replicas
	r.cfg.Marks = map[object.Group]replica.Mark{whole: {Epoch: 3, Seq: 4}, hurt: {Epoch: 3, Seq: 9}}
	r.damaged.Store(key, true)
	if m := r.Marks(); len(m) != 1 || m[whole] != r.cfg.Marks[whole] {
		t.Errorf("beside a damaged object: %v", m)
	}
	r.damaged.Delete(key)
	if m := r.Marks(); len(m) != 2 {
		t.Errorf("when it is whole again: %v", m)
	}
}
