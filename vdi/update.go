package vdi

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"sheepdog/storage/object"
)

// MaxUpdate is the most that Update changes at once, in bytes.
const MaxUpdate = 1 << 20

// Update reads n bytes at off, has fn change them in place, and writes them back, with
// nobody else writing there in between, through whatever node and protocol. If fn fails nothing is written,
// and Update fails with fn's error. fn is called again if another node takes the VDI in
// between. With FlagFUA what is written is durable.
//
// Where the range lies in two objects, other nodes are kept from the VDI meanwhile. Each is written for
// itself: readers may see one before the other, and after a crash, or if the VDI is lost all the same
// between the two, which is ErrIO, one may be there alone.
func (v *Volume) Update(ctx context.Context, off, n int64, f Flags, fn func(p []byte) error) error {
	if n <= 0 || n > MaxUpdate {
		return fmt.Errorf("update of %d bytes, which must be from 1 to %d: %w", n, MaxUpdate, ErrInvalid)
	}
	if err := v.admit(&Request{Op: OpZero, Off: off, Len: n}); err != nil {
		return err
	}
	c := v.core
	buf := make([]byte, n)
	u := update{c: c, v: v, off: off, buf: buf, flags: f, fn: fn, began: int64(time.Since(clock))}
	own := c.own
	if off>>c.shift != (off+n-1)>>c.shift {
		// A hand-over between two objects would leave half of it.
		if err := c.admin.LockWithin(ctx); err != nil {
			return explain(err, "update %s", c.title())
		}
		defer c.admin.Unlock()
		defer c.letGo(ctx)
		own = func(ctx context.Context) error { return c.ownLocked(ctx, adminHold) }
	}
	for until := time.Now().Add(c.s.cfg.OwnWithin); ; {
		if err := own(ctx); err != nil {
			return err
		}
		err := u.once(ctx)
		if !errors.Is(err, object.ErrStale) || time.Now().After(until) || !c.mayResend(&part{began: u.began}) {
			return u.explained(err)
		}
	}
}

// update is one call of Update.
type update struct {
	c     *core
	v     *Volume
	off   int64
	buf   []byte
	flags Flags
	fn    func([]byte) error
	began int64
	asked error // what fn failed with
}

func (u *update) explained(err error) error {
	if err == nil || u.asked != nil && errors.Is(err, u.asked) {
		return err
	}
	return explain(err, "update %d bytes at %d of %s", len(u.buf), u.off, u.c.title())
}

// once reads, asks fn and writes with the stripes of the range closed: no write passes them, and
// what is under way has landed. Other nodes are kept out by the generation: reading and
// writing are under the same one, and with a stripe closed this node adopts no other.
func (u *update) once(ctx context.Context) error {
	c := u.c
	for _, s := range u.stripes() {
		s.close()
		defer s.open()
	}
	m := c.mapping.Load()
	generation := m.generation.Load()
	if generation == 0 {
		return errDisowned
	}
	if err := u.v.do(ctx, OpRead, 0, u.off, int64(len(u.buf)), u.buf); err != nil {
		return err
	}
	if m.generation.Load() != generation {
		return errDisowned // what was read may be another owner's
	}
	if u.asked = u.fn(u.buf); u.asked != nil {
		return u.asked
	}
	r := Request{Op: OpWrite, Flags: u.flags, Off: u.off, Len: int64(len(u.buf)), Data: u.buf}
	r.span.core = c
	for at, end := u.off, u.off+r.Len; at < end; {
		n := min(end-at, c.objectSize()-at&(c.objectSize()-1))
		p := c.cut(new(part), &r, at, n)
		p.began = u.began
		err := c.writeHeld(ctx, p)
		if errors.Is(err, object.ErrStale) && at > u.off {
			return fmt.Errorf("another node took the VDI in the middle: %w", ErrIO) // not to be begun anew
		}
		if err != nil {
			return err
		}
		at += n
	}
	return nil
}

// stripes are those of the range, in the order in which all close them.
func (u *update) stripes() []*stripe {
	var numbers []int
	first, last := u.off>>u.c.shift, (u.off+int64(len(u.buf))-1)>>u.c.shift
	for i := first; i <= last; i++ {
		if k := int(i % stripeCount); !slices.Contains(numbers, k) {
			numbers = append(numbers, k)
		}
	}
	slices.Sort(numbers)
	list := make([]*stripe, len(numbers))
	for i, k := range numbers {
		list[i] = &u.c.gate.stripes[k]
	}
	return list
}
