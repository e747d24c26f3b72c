package iscsi

import (
	"bytes"
	"context"

	"sheepdog/frontends/internal/stream"
	"sheepdog/frontends/iscsi/internal/scsi"
	"sheepdog/vdi"
)

// slowKinds are the plans that wait for the volume, or for other nodes, in the middle.
var slowKinds = map[scsi.Kind]func(*task, context.Context) error{
	scsi.WriteVerify:  (*task).writeVerify,
	scsi.Verify:       (*task).verify,
	scsi.CompareWrite: (*task).compareWrite,
	scsi.OrWrite:      (*task).orWrite,
	scsi.Fill:         (*task).fill,
	scsi.Unmap:        (*task).unmap,
	scsi.Allocation:   (*task).allocation,
	scsi.SelectMode:   (*task).selectMode,
	scsi.ReserveIn:    (*task).reserveIn,
	scsi.ReserveOut:   (*task).reserveOut,
	scsi.Reserve:      (*task).reserveLegacy,
	scsi.Release:      (*task).releaseLegacy,
	scsi.SetGroups:    (*task).setGroups,
	scsi.ExtendedCopy: (*task).extendedCopy,
	scsi.CopyResult:   (*task).copyResult,
}

// piece is how much is read or written at a time by what goes over a range, in bytes.
const piece = 1 << 20

// scratch is memory for a piece; its cost is charged if that needs no waiting, else it is a
// smaller one, which the command's own place in the window bounds.
func (s *session) scratch(n int64) (b []byte, done func()) {
	const least = 64 << 10
	n = min(n, piece)
	if cost := int64(stream.LargeCost(int(n))); n > least && s.stream.TryCharge(cost) {
		l := stream.NewLarge(int(n))
		return l.Bytes()[:n], func() {
			l.Free()
			s.stream.Uncharge(cost)
		}
	}
	return make([]byte, min(n, least)), func() {}
}

// eachPiece reads a range and calls fn with what is there and where in the range that is.
func (t *task) eachPiece(off, n int64, fn func(at int64, got []byte) error) error {
	if n == 0 {
		return nil
	}
	buf, done := t.s.scratch(n)
	defer done()
	for at := int64(0); at < n; {
		k := min(n-at, int64(len(buf)))
		if err := t.do(vdi.OpRead, 0, off+at, k, buf[:k]); err != nil {
			return err
		}
		if err := fn(at, buf[:k]); err != nil {
			return err
		}
		at += k
	}
	return nil
}

// differs is the failure of a comparison at the given byte.
func differs(at int64) error {
	return told(scsi.Sense{Code: scsi.Miscompare, Info: uint64(at), HasInfo: true})
}

// compare compares what is there with want.
func compare(at int64, got, want []byte) error {
	if bytes.Equal(got, want) {
		return nil
	}
	i := 0
	for got[i] == want[i] {
		i++
	}
	return differs(at + int64(i))
}

func (t *task) writeVerify(context.Context) error {
	if t.plan.Len == 0 {
		return nil
	}
	if err := t.do(vdi.OpWrite, vdi.FlagFUA, t.plan.Off, t.plan.Len, t.data); err != nil {
		return err
	}
	return t.eachPiece(t.plan.Off, t.plan.Len, func(at int64, got []byte) error {
		return compare(at, got, t.data[at:at+int64(len(got))])
	})
}

func (t *task) verify(context.Context) error {
	return t.eachPiece(t.plan.Off, t.plan.Len, func(at int64, got []byte) error {
		switch {
		case t.plan.DataOut == 0:
			return nil // it can be read, and its checksums are right
		case !t.plan.Once:
			return compare(at, got, t.data[at:at+int64(len(got))])
		}
		for k := 0; k < len(got); k += len(t.data) {
			if err := compare(at+int64(k), got[k:k+len(t.data)], t.data); err != nil {
				return err
			}
		}
		return nil
	})
}

func (t *task) flags() vdi.Flags {
	if t.plan.FUA {
		return vdi.FlagFUA
	}
	return 0
}

// still is asked when this gateway has become the owner for the task's sake: another one may
// have changed the reservations before, or carried the same command out. It is Check of the task's requests.
func (t *task) still(*vdi.Request) error {
	if err := t.past(); err != nil {
		return err
	}
	if t.at.unit.conflicts(t.s.nexus, &t.plan) {
		return &conflictError{}
	}
	return nil
}

// conflictError is a reservation that was made while the command was on its way.
type conflictError struct{}

func (*conflictError) Error() string { return "reserved by another initiator" }

func (t *task) compareWrite(ctx context.Context) error {
	n := t.plan.Len
	if n == 0 {
		return nil
	}
	return t.at.vol.Update(ctx, t.plan.Off, n, t.flags(), func(p []byte) error {
		if err := t.still(nil); err != nil {
			return err
		}
		if err := compare(0, p, t.data[:n]); err != nil {
			return err
		}
		copy(p, t.data[n:])
		return nil
	})
}

func (t *task) orWrite(ctx context.Context) error {
	for at := int64(0); at < t.plan.Len; {
		n := min(t.plan.Len-at, piece)
		err := t.at.vol.Update(ctx, t.plan.Off+at, n, t.flags(), func(p []byte) error {
			if err := t.still(nil); err != nil {
				return err
			}
			for i, b := range t.data[at : at+n] {
				p[i] |= b
			}
			return nil
		})
		if err != nil {
			return err
		}
		at += n
	}
	return nil
}

// fill repeats the task's block over its range.
func (t *task) fill(ctx context.Context) error {
	if allZero(t.data) {
		return t.do(vdi.OpZero, vdi.FlagNoHole, t.plan.Off, t.plan.Len, nil)
	}
	return t.repeat(ctx, t.plan.Off, t.plan.Len, t.data)
}

func (t *task) repeat(ctx context.Context, off, n int64, pattern []byte) error {
	if n == 0 {
		return nil
	}
	buf, done := t.s.scratch(n)
	defer done()
	for i := 0; i < len(buf); i += len(pattern) {
		copy(buf[i:], pattern)
	}
	for at := int64(0); at < n; at += int64(len(buf)) {
		k := min(n-at, int64(len(buf)))
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := t.do(vdi.OpWrite, 0, off+at, k, buf[:k]); err != nil {
			return err
		}
	}
	return nil
}

func (t *task) unmap(ctx context.Context) error {
	list, sense := scsi.UnmapRanges(t.at.unit.view(), t.data)
	if sense != (scsi.Sense{}) {
		return told(sense)
	}
	for _, r := range list {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := t.do(vdi.OpDiscard, 0, r.Off, r.Len, nil); err != nil {
			return err
		}
	}
	return nil
}

// allocation tells blocks that are allocated at a grain of the store's blocks.
func (t *task) allocation(ctx context.Context) error {
	u := t.at.unit.view()
	data := scsi.NewAllocation(u, t.plan.Limit)
	end := t.plan.Off + t.plan.Len
	err := t.at.vol.Extents(ctx, t.plan.Off, t.plan.Len, func(e vdi.Extent) bool {
		return data.Add(scsi.Range{Off: e.Off, Len: min(e.Len, end-e.Off)}, e.Hole)
	})
	if err != nil {
		return err
	}
	t.answerWith(data.Bytes())
	return nil
}

func (t *task) selectMode(context.Context) error {
	return t.at.unit.selectModes(t.s, t.plan.CDB[0] != opModeSelect6, t.data)
}

const opModeSelect6 = 0x15

// setGroups makes this gateway the owner if the initiator wants it to be optimized.
func (t *task) setGroups(ctx context.Context) error {
	u := t.at.unit
	take, sense := scsi.WantedGroup(u.view(), t.data)
	if sense != (scsi.Sense{}) {
		return told(sense)
	}
	if !take {
		return nil
	}
	if err := t.past(); err != nil {
		return err
	}
	if err := t.s.server.cfg.Volumes.Own(ctx, u.name); err != nil {
		return err
	}
	u.settled()
	return nil
}
