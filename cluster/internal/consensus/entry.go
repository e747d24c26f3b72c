package consensus

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/zeebo/xxh3"
)

// requestID tells a repeated command from a new one.
type requestID [16]byte

// An entry of the log:
//
//	format 2 | request id 16 | since 8 | length of name 1 | machine's name | command | xxh3 of all before, 8
//
// Format 1, of before there were several nodes, has no since.
const (
	entryFormat    = 2
	entryFormatOne = 1
	entryHeader    = 1 + 16 + 8 + 1
	entryTrailer   = 8
	// maxCommand bounds a command in bytes: what is applied at once and held in memory.
	maxCommand = 16 << 20
	maxMachine = 255
	// maxEntry bounds an entry in bytes, so that others need not believe a length.
	maxEntry = entryHeader + maxMachine + maxCommand + entryTrailer
)

// noMachine is the name in an entry that changes nothing: Ready follows it through the log.
const noMachine = ""

var errDamaged = errors.New("entry of the log is damaged")

// entry is a command on its way to a machine.
type entry struct {
	id requestID
	// since is an index of the log that was applied before the command was proposed for
	// the first time: whoever remembers all answers since then knows whether it was
	// applied. The greatest number stands for an entry that is not repeated.
	since   uint64
	machine string
	command []byte
}

const neverRepeated = ^uint64(0)

func (e *entry) encode() ([]byte, error) {
	if len(e.machine) > maxMachine || len(e.command) > maxCommand {
		return nil, fmt.Errorf("command of %d bytes is longer than %d", len(e.command), maxCommand)
	}
	b := make([]byte, 0, entryHeader+len(e.machine)+len(e.command)+entryTrailer)
	b = append(b, entryFormat)
	b = append(b, e.id[:]...)
	b = binary.LittleEndian.AppendUint64(b, e.since)
	b = append(b, byte(len(e.machine)))
	b = append(b, e.machine...)
	b = append(b, e.command...)
	return binary.LittleEndian.AppendUint64(b, xxh3.Hash(b)), nil
}

// decodeEntry returns an entry whose command is a slice of b.
func decodeEntry(b []byte) (e entry, err error) {
	const least = 1 + 16 + 1 + entryTrailer // of format 1
	if len(b) < least || len(b) > maxEntry {
		return e, errDamaged
	}
	body, sum := b[:len(b)-entryTrailer], b[len(b)-entryTrailer:]
	if binary.LittleEndian.Uint64(sum) != xxh3.Hash(body) {
		return e, errDamaged
	}
	format := body[0]
	copy(e.id[:], body[1:])
	body, e.since = body[1+16:], neverRepeated
	switch {
	case format != entryFormat && format != entryFormatOne:
		return e, fmt.Errorf("entry of the log has format %d, this version knows %d: use a newer sheep", format, entryFormat)
	case format == entryFormat && len(body) < 8+1:
		return e, errDamaged
	case format == entryFormat:
		e.since, body = binary.LittleEndian.Uint64(body), body[8:]
	}
	n := int(body[0])
	if len(body) < 1+n {
		return e, errDamaged
	}
	e.machine, e.command = string(body[1:1+n]), body[1+n:]
	return e, nil
}
