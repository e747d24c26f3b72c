package consensus

import (
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"

	wal "github.com/hashicorp/raft-wal"

	"sheepdog/cluster/internal/durable"
)

// began is how far the log was, by what was on the disk, when the node was started first since the cluster took note of
// it. The log goes on before that: what says whether the disk has the newest that this node once had has to be kept
// from before. It is in a file like that of the mark, which needs no space later; 0: the cluster has taken note.
type began struct {
	file *mark
	at   uint64
}

const beganName = "began"

// openBegan looks at a log before anything is appended to it.
func openBegan(dir string, w *wal.WAL, log *slog.Logger) (b *began, err error) {
	file, at, err := openMark(filepath.Join(dir, beganName))
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, file.close(0))
		}
	}()
	if at > 0 {
		return &began{file: file, at: at}, nil
	}
	if at, err = w.LastIndex(); err != nil {
		return nil, err
	}
	snaps, err := openSnapshots(dir, log)
	if err != nil {
		return nil, err
	}
	list, err := snaps.List()
	if err != nil {
		return nil, err
	}
	for _, s := range list { // a log that the leader has sent as a snapshot has no entries
		at = max(at, s.Index)
	}
	if err := file.set(at, true); err != nil {
		return nil, err
	}
	return &began{file: file, at: at}, durable.SyncDir(dir)
}

func (b *began) close() error { return b.file.close(0) }

// Began is the index of the newest entry that this node's disk had, in its log or a snapshot, when it was started first
// since Noted: of a log that was just made it is 0.
func (l *Log) Began() uint64 { return l.began.at }

// Noted says that the cluster knows that this node has started, and has judged by Began what it has. It takes no new space.
func (l *Log) Noted() error {
	if err := l.began.file.set(0, true); err != nil {
		return fmt.Errorf("note that the cluster knows this node: %w", err)
	}
	return nil
}
