package storage_test

import (
	"bytes"
	"fmt"
	"strings"
	"syscall"
	"testing"

	"sheepdog/storage/disk/disktest"
	"sheepdog/storage/object"
)

// A sync fails, and the system takes what it covered for written, though it is in the page cache only. Then the store is killed and opened
// anew: what it finds there, and a sync of it makes durable, is durable, and nothing of the same region that was so before is lost, when
// the power goes after that. So whatever was to be made durable when the sync failed, and whatever makes it so.
func TestKilledAfterSyncFailed(t *testing.T) {
	old, small, large := filled(256<<10, 1), filled(4096, 2), filled(128<<10, 3)
	for _, c := range []struct {
		name   string
		log    bool   // its sync fails, or that of the object's file
		object uint32 // 1: it has content; 2: it is new
		off    uint32
		data   []byte
	}{
		{"small write", true, 1, 64 << 10, small},
		{"large write", false, 1, 64 << 10, large},
		{"zeros", false, 1, 64 << 10, make([]byte, 128<<10)},
		{"large write to a new object", false, 2, 64 << 10, large},
		{"new object", true, 2, 64 << 10, large},
	} {
		for _, first := range []string{"sync", "checkpoint", "close"} {
			t.Run(fmt.Sprintf("%s, %s", c.name, first), func(t *testing.T) {
				d := disktest.New("d")
				s := mustOpen(t, quietConfig(d))
				expect(t, "write", call(s, req(object.OpWrite, 1, 0, old)), nil)
				mustCheckpoint(t, s)
				expect(t, "write", call(s, req(object.OpWrite, c.object, c.off, c.data)), nil)
				hits := 0
				d.Hook(func(op disktest.Op) error {
					if hits == 0 && op.Kind == disktest.OpSync && strings.HasPrefix(op.Name, "wal/") == c.log {
						hits++
						return syscall.EIO
					}
					return nil
				})
				expect(t, "sync", call(s, &object.Request{Op: object.OpSync}), object.ErrIO)
				if hits == 0 {
					t.Fatal("no sync has failed")
				}
				killed := d.Restart()
				_ = s.Close()
				for seed := range uint64(4) {
					d := killed.Restart()
					s := mustOpen(t, quietConfig(d))
					switch first {
					case "sync":
						expect(t, "sync", call(s, &object.Request{Op: object.OpSync}), nil)
					case "checkpoint":
						mustCheckpoint(t, s)
					case "close":
						expect(t, "close", s.Close(), nil)
					}
					cut := d.Reopen(seed)
					if first != "close" {
						_ = s.Close()
					}
					s = mustOpen(t, quietConfig(cut))
					want := append(bytes.Clone(old), make([]byte, 64<<10)...)
					if c.object == 2 {
						clear(want)
					}
					copy(want[c.off:], c.data)
					r := req(object.OpRead, c.object, 0, make([]byte, len(want)))
					expect(t, "read", call(s, r), nil)
					if !bytes.Equal(r.Data, want) {
						t.Errorf("seed %d: the content is not what was made durable", seed)
					}
					expect(t, "close", s.Close(), nil)
				}
			})
		}
	}
}
