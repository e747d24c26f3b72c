package vdi

import (
	"context"

	"sheepdog/vdi/catalog"
)

// SetRecord keeps a text under a key in the cluster's catalog, "" for none any more, if
// revision is still the newest; 0 is that of what is not there. Every node knows it; catalog.Machine tells. It
// fails with ErrStale if somebody else was quicker.
func (s *Service) SetRecord(ctx context.Context, key string, revision uint64, text string) error {
	_, err := s.propose(ctx, catalog.Command{Record: &catalog.SetRecord{Key: key, Revision: revision, Text: text}})
	return explain(err, "keep %q", key)
}
