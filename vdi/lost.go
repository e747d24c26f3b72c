package vdi

import (
	"errors"
	"fmt"

	"sheepdog/storage/object"
)

// What was answered and not flushed may be lost while this node goes on: if all who kept it lost their power. The objects say
// so once, with object.ErrLost, to the next sync of the volume, whoever asks for it. Two things follow:
//   - whoever flushes next is told, each Volume once, and who opens the VDI later too until somebody has Heard it, though it may have
//     been a copy on write, a snapshot or the background that found out;
//   - what is in memory of the map is not what is stored any more, so it is read anew. Who has done something by it, and makes that durable
//     after somebody else was told, begins anew as well: see syncAs.

// noteSync is called with how each sync of a volume has ended that covers what clients wrote; before anybody can see that,
// for who flushes then is not told by the objects any more.
func (c *core) noteSync(m *mapping, err error) {
	if !errors.Is(err, object.ErrLost) {
		return
	}
	c.losses.Add(1)
	m.table.lost.Store(true)
	if now := c.mapping.Load(); now.table == m.table { // else adopt finds it
		c.forget(now)
	}
}

// forget ends ownership by a map in memory that may not be the stored one. It is asked for under another generation, as if
// another node had had the VDI: who copies the family looks at everything again.
func (c *core) forget(m *mapping) {
	c.s.lost(m)
	c.mu.Lock()
	c.doubted, c.unsure = true, true
	c.mu.Unlock()
}

// owed fails if something may have been lost since a flush through v has said so.
func (v *Volume) owed() error {
	c := v.core
	n := c.losses.Load()
	if v.told.Swap(n) == n {
		return nil
	}
	return fmt.Errorf("%w: some of what was written since the last flush", object.ErrLost)
}

// Heard says that a client has got the answers of flushes through v. Until then whoever opens the VDI is told too of what may be
// lost: a client that has given up waiting comes back, and flushes anew.
func (v *Volume) Heard() {
	c, n := v.core, v.told.Load()
	for was := c.told.Load(); was < n && !c.told.CompareAndSwap(was, n); {
		was = c.told.Load()
	}
}

// owes reports whether nobody has been told yet of something that may be lost: who wrote it may come back, and flush.
func (c *core) owes() bool {
	if c.losses.Load() == c.told.Load() {
		return false
	}
	_, err := c.current()
	return err == nil
}
