package storage_test

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"sheepdog/storage/object"
)

const (
	fullSize    = 32 << 20
	fullReserve = 512 << 10
	// fullSlack is what others than the log and the objects take of the reserve: the head of the log, sheep.json, and what
	// replaces it.
	fullSlack = 32 << 10
)

// newFullRig is a rig with disks that have no space for all that may be written.
func newFullRig(t *testing.T, seed uint64, disks int) *rig {
	objects := testKeys()
	for i := range uint32(32) {
		key := object.Key{Group: object.Group{Policy: 1, Partition: object.Partition(i % 5)}, ID: object.DataID(20, i)}
		objects = append(objects, &testObject{key: key, shift: 20})
	}
	r := newRigOf(t, seed, disks, objects)
	r.cfg.LogLimit, r.cfg.Reserve = 4<<20, fullReserve
	r.lacks = new(int)
	for _, d := range r.disks {
		d.SetCapacity(fullSize / int64(disks))
	}
	return r
}

// grows reports whether an action may need space: it is on what has no content yet, and gives it some.
func (r *rig) grows(a *action) bool {
	r.t.Helper()
	if a.req.Op != object.OpWrite && (a.req.Op != object.OpZero || a.req.Flags&object.FlagNoHole == 0) {
		return false
	}
	extents, err := r.store.Extents(context.Background(), a.o.key, a.req.Off, a.req.Len)
	if errors.Is(err, object.ErrNotFound) {
		return true
	}
	if err != nil {
		r.fatalf("extents of %s: %v", a.o.key, err)
	}
	for _, e := range extents {
		if e.Hole {
			return true
		}
	}
	return false
}

// squeezed carries out random operations: what needs no space never fails, nor does the checkpoint, and the reserve is left alone.
func (r *rig) squeezed(steps int) {
	r.t.Helper()
	for _, o := range r.model.objects {
		a := &action{o: o, req: o.request(object.OpWrite, 0, 1<<20), existed: o.exists()}
		a.grows = r.grows(a)
		before := r.model.seq
		r.apply(a)
		if err := r.carryOut(before, []*action{a}); err != nil {
			r.fatalf("fill: %v", err)
		}
	}
	for i := range steps {
		var err error
		switch k := r.rng.IntN(60); {
		case k < 6:
			err = r.sync()
		case k == 6:
			err = r.delete(r.model.objects[r.rng.IntN(len(r.model.objects))])
		case k < 9:
			dst, src := r.model.objects[r.rng.IntN(4)], r.model.objects[r.rng.IntN(4)]
			if err = r.copy(dst, src); errors.Is(err, object.ErrNoSpace) {
				*r.lacks++
				r.verifyObject(dst, killed)
				err = nil
			}
		case k < 13:
			err = r.readSome(r.model.objects[r.rng.IntN(len(r.model.objects))])
		case k == 13:
			r.within("Checkpoint", func() { err = r.store.Checkpoint(context.Background()) })
		default:
			err = r.changes(1 + r.rng.IntN(r.batch))
		}
		if err != nil {
			r.fatalf("step %d: %v", i, err)
		}
		for _, d := range r.disks {
			if free := fullSize/int64(len(r.disks)) - d.Used(); free < fullReserve-fullSlack {
				r.fatalf("step %d: %s has %d bytes free", i, d, free)
			}
		}
	}
}

// TestModelFull is TestModel on disks that are full most of the time.
func TestModelFull(t *testing.T) {
	t.Parallel()
	n, times, steps := rounds(4), 6, 150
	if hurried(t) {
		n, times, steps = n/2, 2, 30
	}
	for seed := range uint64(n) {
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) {
			t.Parallel()
			r := newFullRig(t, seed+9000, 1+int(seed%2))
			r.mustOpen()
			for range times {
				r.squeezed(steps)
				f := fate(r.rng.IntN(3))
				r.end(f)
				r.mustOpen()
				r.verify(f)
			}
			if *r.lacks == 0 {
				t.Error("no disk was full")
			}
			r.mustClose()
		})
	}
}
