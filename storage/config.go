package storage

import (
	"fmt"
	"log/slog"
	"time"

	"sheepdog/storage/disk"
	"sheepdog/storage/internal/wal"
	"sheepdog/storage/object"
)

// Config says what a Store works with. The zero value of every field but Disks
// stands for its default.
type Config struct {
	Disks   []disk.FS    // at least one; the order means nothing
	Node    string       // identity written to and checked against sheep.json
	Cluster string       // likewise; "" while the cluster is not formatted (see Store.SetIdentity)
	Logger  *slog.Logger // default: discards

	LogLimit    int64         // bytes of log per disk, default 512 MiB, at least 2 MiB, at most 1/16 to 1/8 of the disk; half of it makes a checkpoint begin
	SmallWrite  int           // bytes; larger writes go to object files directly. Default 32 KiB, at most 64 KiB
	Reserve     int64         // bytes kept free on each disk; default 1/64 of it, at most 1 GiB. Negative: none
	OpenObjects int           // object files kept open per disk, default 4096, at least 16
	Workers     int           // operations per disk that may wait for it at once, default 32
	Checkpoint  time.Duration // oldest age of what the log holds, default 30 s. Negative: only by size
	ScrubRate   int64         // bytes per second and disk of the background scrub, default 16 MiB; negative: no background scrub
	MoveRate    int64         // bytes per second at which partitions go to other disks while there are clients, default 32 MiB; negative: they do not
	ScrubEvery  time.Duration // from the start of one background scrub to the next, default 7 days
}

const (
	minLogLimit       = 2 << 20
	maxSmallWrite     = 64 << 10
	maxReserve        = 1 << 30
	minOpenObjects    = 16
	defaultLogLimit   = 512 << 20
	defaultSmallWrite = 32 << 10
	defaultOpen       = 4096
	defaultWorkers    = 32
	defaultCheckpoint = 30 * time.Second
	defaultScrubRate  = 16 << 20
	defaultMoveRate   = 32 << 20
	defaultScrubEvery = 7 * 24 * time.Hour
	// logSegments is how many segments a log of full length has.
	logSegments = 32
)

func (c *Config) validate() error {
	if len(c.Disks) == 0 {
		return fmt.Errorf("open store: no disks are configured: %w", object.ErrInvalid)
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	setDefault(&c.LogLimit, defaultLogLimit)
	setDefault(&c.SmallWrite, defaultSmallWrite)
	setDefault(&c.OpenObjects, defaultOpen)
	setDefault(&c.Workers, defaultWorkers)
	setDefault(&c.Checkpoint, defaultCheckpoint)
	setDefault(&c.ScrubRate, defaultScrubRate)
	setDefault(&c.MoveRate, defaultMoveRate)
	setDefault(&c.ScrubEvery, defaultScrubEvery)
	c.OpenObjects = max(c.OpenObjects, minOpenObjects)
	switch {
	case c.LogLimit < minLogLimit:
		return fmt.Errorf("open store: log limit of %d bytes is below %d: %w", c.LogLimit, minLogLimit, object.ErrInvalid)
	case c.SmallWrite < 0 || c.SmallWrite > maxSmallWrite:
		return fmt.Errorf("open store: small write limit of %d bytes is not within 1 and %d: %w", c.SmallWrite, maxSmallWrite, object.ErrInvalid)
	case c.Workers < 1:
		return fmt.Errorf("open store: %d workers: %w", c.Workers, object.ErrInvalid)
	}
	return nil
}

func setDefault[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// logShare is the part of a disk that its log may take: one in so many.
const logShare = 8

// logLimit is what the log may take of a disk with total bytes. On a small one it is a power of two: a file
// system that is a little larger the next time shall not change the size of segments.
func (c *Config) logLimit(total int64) int64 {
	if c.LogLimit <= total/logShare {
		return c.LogLimit
	}
	n := int64(minLogLimit)
	for 2*n <= total/logShare {
		n *= 2
	}
	return n
}

// segments are the size, in bytes, and the number of the segments that a log with a limit has.
func segments(limit int64) (size int64, most int) {
	size = limit / logSegments &^ (object.BlockSize - 1)
	size = min(max(size, wal.MinSegmentBytes), wal.MaxSegmentBytes)
	return size, max(int(limit/size), wal.MinSegments)
}
