package wal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/zeebo/xxh3"

	"sheepdog/storage/disk"
)

// The head file says where the log begins: segments before first are retired and may
// hold anything. It has two sectors that are written one after the other. A crash leaves
// one of them whole, and the newer whole one is always a true statement; when one of
// them rots later, the other still says the same.
const (
	headMagic = 0x3144414548474f4c // "LOGHEAD1"
	headName  = "head"
)

type head struct {
	file  disk.File
	turn  uint64 // counts writes; the parity picks the sector
	first uint32 // sequence number of the first live segment
	boot  uint32 // counts openings: makes generations unique
}

// openHead reads the head file; fresh is true when there is no usable one.
func openHead(fsys disk.FS, dir string) (h *head, fresh bool, err error) {
	f, err := fsys.OpenFile(dir+"/"+headName, 0)
	if errors.Is(err, fs.ErrNotExist) {
		f, err = fsys.OpenFile(dir+"/"+headName, disk.Create)
	}
	if err != nil {
		return nil, false, fmt.Errorf("open log head: %w", err)
	}
	h = &head{file: f}
	var b [2 * sectorBytes]byte
	if _, err := f.ReadAt(b[:], 0); err != nil && !errors.Is(err, io.EOF) {
		f.Close()
		return nil, false, fmt.Errorf("read log head: %w", err)
	}
	fresh = true
	for i := range 2 {
		if turn, first, boot, ok := decodeHead(b[i*sectorBytes:][:sectorBytes]); ok && (fresh || turn > h.turn) {
			h.turn, h.first, h.boot, fresh = turn, first, boot, false
		}
	}
	return h, fresh, nil
}

func decodeHead(b []byte) (turn uint64, first, boot uint32, ok bool) {
	le := binary.LittleEndian
	if le.Uint64(b) != headMagic || le.Uint64(b[8:]) != xxh3.Hash(b[16:sectorBytes]) {
		return 0, 0, 0, false
	}
	return le.Uint64(b[16:]), le.Uint32(b[24:]), le.Uint32(b[28:]), true
}

// save makes first and boot durable, in both sectors.
func (h *head) save(first, boot uint32) error {
	for range 2 {
		if err := h.write(first, boot); err != nil {
			return err
		}
	}
	return nil
}

// again makes durable what was read. A sync alone would not do that where one has failed before: the system takes what that one
// has lost for written.
func (h *head) again() error {
	if h.turn == 0 {
		return nil
	}
	return h.save(h.first, h.boot)
}

func (h *head) write(first, boot uint32) error {
	le := binary.LittleEndian
	var b [sectorBytes]byte
	turn := h.turn + 1
	le.PutUint64(b[0:], headMagic)
	le.PutUint64(b[16:], turn)
	le.PutUint32(b[24:], first)
	le.PutUint32(b[28:], boot)
	le.PutUint64(b[8:], xxh3.Hash(b[16:]))
	if _, err := h.file.WriteAt(b[:], int64(turn%2)*sectorBytes); err != nil {
		return fmt.Errorf("write log head: %w", err)
	}
	if err := h.file.Sync(); err != nil {
		return fmt.Errorf("sync log head: %w", err)
	}
	h.turn, h.first, h.boot = turn, first, boot
	return nil
}
