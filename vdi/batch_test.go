package vdi_test

import (
	"context"
	"encoding/json"
	"fmt"
	"testing"

	"sheepdog/vdi"
	"sheepdog/vdi/catalog"
	"sheepdog/vdi/vditest"
)

// longest notes how many vids a command of the collector is about at most.
type longest struct {
	*vditest.World
	commands, most int
}

func (l *longest) Propose(ctx context.Context, machine string, command []byte) ([]byte, error) {
	var c catalog.Command
	if err := json.Unmarshal(command, &c); err != nil {
		return nil, err
	}
	n := 0
	if c.Collected != nil {
		n = len(c.Collected.Refs)
	} else if c.MapGone != nil {
		n = len(c.MapGone.Refs)
	}
	if n > 0 {
		l.commands++
	}
	l.most = max(l.most, n)
	return l.World.Propose(ctx, machine, command)
}

// Many snapshots that are deleted go in several commands: none keeps clients waiting for all of them.
func TestCollectInParts(t *testing.T) {
	w := vditest.NewWorld(t)
	log := &longest{World: w}
	w.Config = func(c *vdi.Config) { c.Log = log }
	s := w.Service()
	v := create(t, s, "v", 1<<20)
	for range 600 {
		i := must[vdi.Info](t)(s.Snapshot(ctx, "v", ""))
		if err := s.Delete(ctx, "v", fmt.Sprint(i.SnapshotID)); err != nil {
			t.Fatal(err)
		}
	}
	v.Close()
	if err := s.Collect(ctx); err != nil {
		t.Fatal(err)
	}
	if log.most > 256 || log.commands < 3 {
		t.Errorf("%d commands are about %d vids at most", log.commands, log.most)
	}
	if err := s.Delete(ctx, "v", ""); err != nil {
		t.Fatal(err)
	}
	emptyOut(t, w, s, "in the end")
}
