package cluster

import (
	"testing"

	"sheepdog/cluster/internal/replicas"
)

// What is left to be brought is told from what was brought, but of partitions that are not listed no more than what the
// node holds itself: few of many partitions have an object, and the first that are completed may all be among them.
func TestLeftBytesAreNoMoreThanThereIs(t *testing.T) {
	const mib = 1 << 20
	held := density{objects: 64, partitions: 4096}
	for _, c := range []struct {
		name    string
		w       replicas.Recovering
		missing int
		held    density
		want    uint64
	}{
		{name: "nothing is known", w: replicas.Recovering{Partitions: 8, Unlisted: 8}, missing: 2048, held: held},
		{name: "the first has five", w: replicas.Recovering{Partitions: 8, Unlisted: 8, Done: 5, DoneBytes: 20 * mib, InSync: 1}, missing: 2048, held: held, want: 32 * 4 * mib},
		{name: "listed ones are known", w: replicas.Recovering{Partitions: 8, Objects: 7, Done: 5, DoneBytes: 20 * mib, InSync: 1}, missing: 8, held: held, want: 7 * 4 * mib},
		{name: "little has changed", w: replicas.Recovering{Partitions: 8, Unlisted: 8, Done: 4, DoneBytes: 16 * mib, InSync: 1024}, missing: 1024, held: held, want: 4 * 4 * mib},
		{name: "none is completed", w: replicas.Recovering{Partitions: 8, Unlisted: 6, Objects: 3, Done: 1, DoneBytes: 2 * mib}, missing: 2048, held: held, want: 3 * 2 * mib},
		{name: "equal ones are not moved", w: replicas.Recovering{Partitions: 2, Objects: 10, Done: 4, DoneBytes: 4 * mib, InSync: 1}, missing: 2, held: held, want: 10 * mib},
		{name: "a view that is older", w: replicas.Recovering{Partitions: 4, Objects: 1, Done: 1, DoneBytes: mib, InSync: 1}, missing: 3, held: held, want: mib},
	} {
		if got := leftBytes(c.w, c.missing, c.held); got != c.want {
			t.Errorf("%s: %d MiB, want %d", c.name, got/mib, c.want/mib)
		}
	}
}
