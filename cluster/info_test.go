package cluster

import (
	"strings"
	"testing"

	"sheepdog/cluster/internal/replicas"
	"sheepdog/storage/object"
)

// Partitions that are served by nobody because the last node that has them cannot list them count as unavailable, also if all nodes are up and
// everything is in sync, and who asks is told why and what to do.
func TestInfoTellsOfWhatCannotBeListed(t *testing.T) {
	i := Info{Status: StatusOK}
	if i.addUnlisted(replicas.Unlisted{}); i.Status != StatusOK {
		t.Errorf("with nothing wrong: %s, %s", i.Status, i.Reason)
	}
	i.addUnlisted(replicas.Unlisted{Unserved: 3, Example: object.Group{Policy: 1, Partition: 7}, Err: object.ErrIO})
	if i.Status != StatusUnavailable {
		t.Errorf("status %s", i.Status)
	}
	for _, want := range []string{"3 partitions", object.Group{Policy: 1, Partition: 7}.String(), object.ErrIO.Error(), "repair its disk", "dog node give-up"} {
		if !strings.Contains(i.Reason, want) {
			t.Errorf("%q is not in %q", want, i.Reason)
		}
	}
}
