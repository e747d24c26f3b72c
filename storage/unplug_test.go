package storage

import (
	"context"
	"errors"
	"testing"

	"sheepdog/storage/disk"
	"sheepdog/storage/object"
)

// What waits for room on a disk that is taken out, or comes too late, hears that the disk is gone. It is not told
// that the store shuts down: those above would believe that the node does.
func TestUnplugFailsWhatWaits(t *testing.T) {
	s, err := Open(Config{Disks: []disk.FS{openDir(t), openDir(t)}, Node: "n", ScrubRate: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	d := s.routes.drives()[1]
	if err := s.Retire(d.name); err != nil {
		t.Fatal(err)
	}
	d.unmerged.Store(1 << 40) // nothing is let go on
	var outcomes []error
	write := func() *object.Request {
		return &object.Request{Op: object.OpWrite, SizeShift: 20, ID: 1, Policy: 1, Len: 1, Data: []byte{1}, Done: func(r *object.Request) { outcomes = append(outcomes, r.Err) }}
	}
	d.upkeep.stall(write())
	if err := s.Unplug(d.name); err != nil {
		t.Fatal(err)
	}
	d.upkeep.stall(write())
	outcomes = append(outcomes, d.upkeep.wait(context.Background()))
	if len(outcomes) != 3 {
		t.Fatalf("%d outcomes", len(outcomes))
	}
	for i, err := range outcomes {
		if !errors.Is(err, object.ErrIO) || errors.Is(err, object.ErrClosed) {
			t.Errorf("outcome %d: %v", i, err)
		}
	}
}
