package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strings"
	"testing"
	"time"

	"sheepdog/frontends/nbd/internal/wire"
	"sheepdog/vdi"
)

var allHeaders = []wire.Headers{wire.Simple, wire.Structured, wire.Extended}

// forHeaders runs a test over a fresh volume for each form of messages.
func forHeaders(t *testing.T, size int64, test func(t *testing.T, h *harness, c *client, d *disk)) {
	for _, headers := range allHeaders {
		t.Run(headers.String(), func(t *testing.T) {
			st := newStore(map[string]int64{"vm1": size})
			h := serve(t, st, nil)
			test(t, h, h.open("vm1", headers), st.disk("vm1"))
		})
	}
}

func random(n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(b)
	return b
}

func TestReadWrite(t *testing.T) {
	forHeaders(t, 80*mib, func(t *testing.T, h *harness, c *client, d *disk) {
		model := make([]byte, 80*mib)
		for i, n := range []int{1, 511, 4096, 4097, 16<<10 - 28, 16 << 10, 40000, 64 << 10, 64<<10 + 1, 200_000, mib, 3*mib + 7, MaxPayload} {
			off := uint64(i*4096 + i)
			p := random(n)
			copy(model[off:], p)
			c.expect(0, wire.NBD_CMD_WRITE, 0, off, uint64(n), p)
			if got := c.readData(0, off, n); !bytes.Equal(got, p) {
				t.Fatalf("read of %d bytes differs", n)
			}
		}
		for off := 0; off < len(model); off += 20 * mib {
			if got := c.readData(0, uint64(off), 20*mib); !bytes.Equal(got, model[off:off+20*mib]) {
				t.Fatalf("volume differs at %d", off)
			}
		}
		if !bytes.Equal(d.content(), model) {
			t.Error("volume differs from what was written")
		}
		c.disconnect()
	})
}

func TestEmptyRequests(t *testing.T) {
	forHeaders(t, mib, func(t *testing.T, h *harness, c *client, d *disk) {
		for _, typ := range []uint16{wire.NBD_CMD_READ, wire.NBD_CMD_TRIM, wire.NBD_CMD_WRITE_ZEROES, wire.NBD_CMD_CACHE} {
			c.expect(0, typ, 0, 0, 0, nil)
			c.expect(0, typ, 0, mib, 0, nil)
		}
		c.expect(0, wire.NBD_CMD_WRITE, 0, 5, 0, []byte{})
		if seen := d.submitted(); len(seen) != 0 {
			t.Errorf("empty requests reached the volume: %+v", seen)
		}
		c.disconnect()
	})
}

func TestHoles(t *testing.T) {
	for _, headers := range []wire.Headers{wire.Structured, wire.Extended} {
		st := newStore(map[string]int64{"vm1": 4 * mib})
		h := serve(t, st, nil)
		copy(st.disk("vm1").data[mib+holeGrain:], random(holeGrain))
		c := h.open("vm1", headers)
		types := func(flags uint16, off uint64, n int) string {
			list := c.reply(c.send(wire.NBD_CMD_READ, flags, off, uint64(n), nil), n)
			if got := c.assemble(off, n, list); !bytes.Equal(got, st.disk("vm1").data[off:off+uint64(n)]) {
				t.Errorf("read at %d+%d differs", off, n)
			}
			var s string
			for _, r := range list {
				s += string("ndh"[r.typ])
			}
			return s
		}
		for _, x := range []struct {
			flags uint16
			off   uint64
			n     int
			want  string
		}{
			{0, 0, 4096, "h"}, {0, 0, mib, "h"}, {wire.NBD_CMD_FLAG_DF, 0, mib, "h"},
			{0, mib, mib, "hdh"}, {wire.NBD_CMD_FLAG_DF, mib, mib, "d"},
			{0, mib + holeGrain, holeGrain, "d"}, {0, mib + 4096, 3 * holeGrain, "hdh"}, {0, mib + holeGrain + 100, 2 * holeGrain, "dh"},
		} {
			if got := types(x.flags, x.off, x.n); got != x.want {
				t.Errorf("read flags %#x at %d+%d: chunks %q, want %q", x.flags, x.off, x.n, got, x.want)
			}
		}
		c.disconnect()
	}
}

func TestRequestErrors(t *testing.T) {
	const size = 2 * mib
	forHeaders(t, size, func(t *testing.T, h *harness, c *client, d *disk) {
		toobig := wire.NBD_EOVERFLOW
		if c.headers == wire.Simple {
			toobig = wire.NBD_EINVAL
		}
		p := make([]byte, 4096)
		for _, x := range []struct {
			want       wire.Errno
			typ, flags uint16
			off, n     uint64
			payload    []byte
		}{
			{wire.NBD_EINVAL, wire.NBD_CMD_READ, 0, size, 1, nil},
			{wire.NBD_EINVAL, wire.NBD_CMD_READ, 0, size - 4095, 4096, nil},
			{wire.NBD_EINVAL, wire.NBD_CMD_READ, 0, 1 << 63, 4096, nil},
			{wire.NBD_EINVAL, wire.NBD_CMD_READ, 0, ^uint64(0), 2, nil},
			{wire.NBD_ENOSPC, wire.NBD_CMD_WRITE, 0, size - 4095, 4096, p},
			{wire.NBD_ENOSPC, wire.NBD_CMD_WRITE, 0, ^uint64(0), 4096, p},
			{wire.NBD_ENOSPC, wire.NBD_CMD_WRITE, 0, size, mib, make([]byte, mib)},
			{wire.NBD_EINVAL, wire.NBD_CMD_TRIM, 0, size - 4095, 4096, nil},
			{wire.NBD_ENOSPC, wire.NBD_CMD_WRITE_ZEROES, 0, size - 4095, 4096, nil},
			{wire.NBD_EINVAL, wire.NBD_CMD_CACHE, 0, size - 4095, 4096, nil},
			{wire.NBD_EINVAL, wire.NBD_CMD_BLOCK_STATUS, 0, 0, 4096, nil}, // no context was selected
			{wire.NBD_EINVAL, wire.NBD_CMD_FLUSH, 0, 1, 0, nil},
			{wire.NBD_EINVAL, wire.NBD_CMD_FLUSH, 0, 0, 1, nil},
			{wire.NBD_EINVAL, 8, 0, 0, 0, nil},
			{wire.NBD_EINVAL, 65535, 0, 0, 4096, nil},
			{wire.NBD_EINVAL, wire.NBD_CMD_READ, 1 << 15, 0, 512, nil},
			{wire.NBD_EINVAL, wire.NBD_CMD_READ, wire.NBD_CMD_FLAG_NO_HOLE, 0, 512, nil},
			{wire.NBD_EINVAL, wire.NBD_CMD_WRITE, wire.NBD_CMD_FLAG_DF, 0, 4096, p},
			{wire.NBD_EINVAL, wire.NBD_CMD_WRITE, 1 << 9, 0, mib, make([]byte, mib)},
			{wire.NBD_EINVAL, wire.NBD_CMD_TRIM, wire.NBD_CMD_FLAG_NO_HOLE, 0, 512, nil},
			{wire.NBD_EINVAL, wire.NBD_CMD_CACHE, wire.NBD_CMD_FLAG_REQ_ONE, 0, 512, nil},
			{wire.NBD_ENOTSUP, wire.NBD_CMD_WRITE_ZEROES, wire.NBD_CMD_FLAG_FAST_ZERO | wire.NBD_CMD_FLAG_NO_HOLE, 0, 4096, nil},
		} {
			c.expect(x.want, x.typ, x.flags, x.off, x.n, x.payload)
		}
		if seen := d.submitted(); len(seen) != 0 {
			t.Errorf("bad requests reached the volume: %+v", seen)
		}
		if c.headers == wire.Simple {
			c.expect(wire.NBD_EINVAL, wire.NBD_CMD_READ, wire.NBD_CMD_FLAG_DF, 0, 512, nil)
		}
		if c.headers != wire.Extended {
			c.expect(wire.NBD_EINVAL, wire.NBD_CMD_READ, wire.NBD_CMD_FLAG_PAYLOAD_LEN, 0, 512, nil)
		}
		c.expect(0, wire.NBD_CMD_FLUSH, 0, 0, 0, nil) // and it goes on
		big := serve(t, newStore(map[string]int64{"vm1": 2 * MaxPayload}), nil).open("vm1", c.headers)
		big.expect(toobig, wire.NBD_CMD_READ, 0, 0, MaxPayload+1, nil)
		big.disconnect()
		c.disconnect()
	})
}

// Reading, a client may ask for what no server can give; writing, the session ends.
func TestPayloadBeyondMaximumEndsTheSession(t *testing.T) {
	forHeaders(t, mib, func(t *testing.T, h *harness, c *client, d *disk) {
		flags := uint16(0)
		if c.headers == wire.Extended {
			flags = wire.NBD_CMD_FLAG_PAYLOAD_LEN
		}
		list := c.reply(c.send(wire.NBD_CMD_WRITE, flags, 0, MaxPayload+1, nil), 0)
		if list[0].errno != wire.NBD_EINVAL {
			t.Errorf("error %d", list[0].errno)
		}
		c.expectClosed()
	})
}

func TestExtendedPayloads(t *testing.T) {
	h := serve(t, newStore(map[string]int64{"vm1": mib}), nil)
	c := h.open("vm1", wire.Extended)
	c.expect(wire.NBD_EINVAL, wire.NBD_CMD_WRITE, 0, 0, 4096, nil) // without a payload
	for _, typ := range []uint16{wire.NBD_CMD_READ, wire.NBD_CMD_FLUSH, wire.NBD_CMD_TRIM, 99} {
		c.expect(wire.NBD_EINVAL, typ, 0, 0, 100_000, make([]byte, 100_000)) // consumed gracefully
	}
	c.expect(0, wire.NBD_CMD_WRITE, 0, 0, 4096, random(4096))
	c.disconnect()
}

func TestWrongMagicEndsTheSession(t *testing.T) {
	forHeaders(t, mib, func(t *testing.T, h *harness, c *client, d *disk) {
		b := requestMessage(c.headers, wire.Request{Type: wire.NBD_CMD_FLUSH}, nil)
		b[0] ^= 1
		c.write(b)
		c.expectClosed()
	})
}

func TestReadOnly(t *testing.T) {
	st := newStore(map[string]int64{"vm1": mib})
	copy(st.disk("vm1").data, random(mib))
	st.snapshot("vm1", "s1")
	clear(st.disk("vm1").data)
	h := serve(t, st, nil)
	for _, headers := range allHeaders {
		c := h.open("vm1@s1", headers)
		if got := c.readData(0, 0, mib); !bytes.Equal(got, random(mib)) {
			t.Error("snapshot differs")
		}
		c.expect(wire.NBD_EPERM, wire.NBD_CMD_WRITE, 0, 0, 4096, make([]byte, 4096))
		c.expect(wire.NBD_EPERM, wire.NBD_CMD_WRITE, 0, 0, mib, make([]byte, mib))
		c.expect(wire.NBD_EPERM, wire.NBD_CMD_TRIM, 0, 0, 4096, nil)
		c.expect(wire.NBD_EPERM, wire.NBD_CMD_WRITE_ZEROES, 0, 0, 4096, nil)
		c.expect(0, wire.NBD_CMD_FLUSH, 0, 0, 0, nil)
		c.expect(0, wire.NBD_CMD_CACHE, 0, 0, 4096, nil)
		c.disconnect()
	}
}

// What the volume is asked for, command by command and flag by flag.
func TestRequestsReachTheVolume(t *testing.T) {
	const fua = wire.NBD_CMD_FLAG_FUA
	forHeaders(t, 1<<20, func(t *testing.T, h *harness, c *client, d *disk) {
		for _, x := range []struct {
			typ, flags uint16
			off, n     uint64
			want       vdi.Request
		}{
			{wire.NBD_CMD_READ, 0, 1, 2, vdi.Request{Op: vdi.OpRead, Off: 1, Len: 2}},
			{wire.NBD_CMD_READ, fua, 1, 2, vdi.Request{Op: vdi.OpRead, Off: 1, Len: 2}},
			{wire.NBD_CMD_WRITE, 0, 3, 4, vdi.Request{Op: vdi.OpWrite, Off: 3, Len: 4}},
			{wire.NBD_CMD_WRITE, fua, 3, 4, vdi.Request{Op: vdi.OpWrite, Flags: vdi.FlagFUA, Off: 3, Len: 4}},
			{wire.NBD_CMD_FLUSH, 0, 0, 0, vdi.Request{Op: vdi.OpFlush}},
			{wire.NBD_CMD_FLUSH, fua, 0, 0, vdi.Request{Op: vdi.OpFlush}},
			{wire.NBD_CMD_TRIM, 0, 0, mib, vdi.Request{Op: vdi.OpDiscard, Len: mib}},
			{wire.NBD_CMD_TRIM, fua, 9, 9, vdi.Request{Op: vdi.OpDiscard, Flags: vdi.FlagFUA, Off: 9, Len: 9}},
			{wire.NBD_CMD_WRITE_ZEROES, 0, 0, mib, vdi.Request{Op: vdi.OpZero, Len: mib}},
			{wire.NBD_CMD_WRITE_ZEROES, fua | wire.NBD_CMD_FLAG_NO_HOLE, 5, 6, vdi.Request{Op: vdi.OpZero, Flags: vdi.FlagFUA | vdi.FlagNoHole, Off: 5, Len: 6}},
			{wire.NBD_CMD_WRITE_ZEROES, wire.NBD_CMD_FLAG_FAST_ZERO, 0, mib, vdi.Request{Op: vdi.OpZero, Len: mib}},
			{wire.NBD_CMD_CACHE, 0, 4096, 4096, vdi.Request{Op: vdi.OpCache, Off: 4096, Len: 4096}},
		} {
			d.submitted()
			var p []byte
			if x.typ == wire.NBD_CMD_WRITE {
				p = make([]byte, x.n)
			}
			length := 0
			if x.typ == wire.NBD_CMD_READ {
				length = int(x.n)
			}
			list := c.reply(c.send(x.typ, x.flags, x.off, x.n, p), length)
			seen := d.submitted()
			if list[0].errno != 0 || len(seen) != 1 || seen[0].Op != x.want.Op || seen[0].Flags != x.want.Flags || seen[0].Off != x.want.Off || seen[0].Len != x.want.Len {
				t.Errorf("%s flags %#x: error %d, volume got %+v, want %+v", commandName(x.typ), x.flags, list[0].errno, seen, x.want)
			}
		}
		c.disconnect()
	})
}

func TestEveryErrorKind(t *testing.T) {
	kinds := []error{vdi.ErrNotFound, vdi.ErrExists, vdi.ErrInvalid, vdi.ErrNoSpace, vdi.ErrCorrupt, vdi.ErrIO, vdi.ErrReadOnly, vdi.ErrLocked, vdi.ErrBusy,
		vdi.ErrStale, vdi.ErrUnavailable, vdi.ErrUnsupported, vdi.ErrClosed, context.Canceled, context.DeadlineExceeded}
	for _, k := range kinds {
		found := 0
		for _, r := range results {
			if errors.Is(k, r.kind) {
				found++
			}
		}
		if found != 1 {
			t.Errorf("%v is in the table %d times", k, found)
		}
	}
	if resultOf(errors.New("something else")) != wire.NBD_EIO {
		t.Error("unknown errors are not NBD_EIO")
	}
	forHeaders(t, mib, func(t *testing.T, h *harness, c *client, d *disk) {
		for _, r := range results {
			d.set(func() {
				d.fail[vdi.OpRead] = fmt.Errorf("read object: %w", r.kind)
				d.fail[vdi.OpWrite] = r.kind
			})
			for _, n := range []int{4096, 256 << 10} {
				list := c.reply(c.send(wire.NBD_CMD_READ, 0, 0, uint64(n), nil), n)
				if list[0].errno != r.errno {
					t.Errorf("%v: error %d, want %d", r.kind, list[0].errno, r.errno)
				}
				if c.headers != wire.Simple && !strings.Contains(list[0].text, r.kind.Error()) {
					t.Errorf("%v: message %q", r.kind, list[0].text)
				}
			}
			c.expect(r.errno, wire.NBD_CMD_WRITE, 0, 0, 512, make([]byte, 512))
		}
		c.disconnect()
	})
}

// Requests complete in the order in which the volume completes them.
func TestOutOfOrder(t *testing.T) {
	forHeaders(t, 64*mib, func(t *testing.T, h *harness, c *client, d *disk) {
		p := random(mib)
		hold := make(chan struct{})
		d.set(func() {
			copy(d.data, p)
			d.hold = hold
		})
		var held []uint64
		for range 200 {
			held = append(held, c.send(wire.NBD_CMD_READ, 0, 0, 512, nil))
		}
		h.eventually("held requests do not arrive", func() bool { return h.Counters().InFlight == 200 })
		d.set(func() { d.hold = nil })
		c.expect(0, wire.NBD_CMD_FLUSH, 0, 0, 0, nil)
		close(hold)
		got := map[uint64]bool{}
		for range held {
			r := c.receiveChunk(512)
			got[r.cookie] = true
		}
		for _, cookie := range held {
			if !got[cookie] {
				t.Errorf("no reply to %d", cookie)
			}
		}
		c.disconnect()
	})
}

// All requests that are received together are submitted before one Kick.
func TestOneKickPerBatch(t *testing.T) {
	forHeaders(t, mib, func(t *testing.T, h *harness, c *client, d *disk) {
		var batch []byte
		for i := range 32 {
			batch = append(batch, requestMessage(c.headers, wire.Request{Type: wire.NBD_CMD_READ, Cookie: uint64(i), Length: 64}, nil)...)
		}
		c.write(batch)
		for range 32 {
			c.receiveChunk(64)
		}
		if n := d.kicks.Load(); n != 1 {
			t.Errorf("%d kicks for one batch", n)
		}
		c.disconnect()
	})
}

// A random workload with many requests in flight, against a model, over every form
// of message and kind of connection.
func TestWorkload(t *testing.T) {
	forHeaders(t, 8*mib, func(t *testing.T, h *harness, c *client, d *disk) {
		d.set(func() {
			d.delay = func(r *vdi.Request) {
				if r.Off%3 == 0 {
					time.Sleep(time.Duration(r.Off%50) * time.Microsecond)
				}
			}
		})
		rng := rand.New(rand.NewPCG(1, uint64(c.headers)))
		model := make([]byte, 8*mib)
		const slots, slot = 32, 256 << 10 // each request in flight has a range of its own
		type pending struct {
			slot, off, n int
			read         bool
		}
		open := map[uint64]pending{}
		busy := map[int]bool{}
		got := map[uint64][]message{}
		finish := func() {
			n := 0
			r := c.receiveChunkFor(func(cookie uint64) int {
				n = open[cookie].n
				if !open[cookie].read {
					n = 0
				}
				return n
			})
			got[r.cookie] = append(got[r.cookie], r)
			if r.flags&wire.NBD_REPLY_FLAG_DONE == 0 {
				return
			}
			p, ok := open[r.cookie]
			if !ok {
				t.Fatalf("reply to %d, which is not in flight", r.cookie)
			}
			if r.errno != 0 {
				t.Fatalf("error %d", r.errno)
			}
			if p.read && !bytes.Equal(c.assemble(uint64(p.off), p.n, got[r.cookie]), model[p.off:p.off+p.n]) {
				t.Fatalf("read at %d+%d differs", p.off, p.n)
			}
			delete(open, r.cookie)
			delete(got, r.cookie)
			delete(busy, p.slot)
		}
		for range 3000 {
			for len(open) > rng.IntN(slots) {
				finish()
			}
			s := rng.IntN(slots)
			if busy[s] {
				continue
			}
			n := 1 + rng.IntN([]int{512, 8192, 128 << 10}[rng.IntN(3)])
			off := s*slot + rng.IntN(slot-n)
			var cookie uint64
			p := pending{slot: s, off: off, n: n}
			switch rng.IntN(8) {
			case 0:
				cookie = c.send(wire.NBD_CMD_WRITE_ZEROES, 0, uint64(off), uint64(n), nil)
				clear(model[off : off+n])
			case 1, 2, 3:
				data := random(n)
				copy(model[off:], data)
				cookie = c.send(wire.NBD_CMD_WRITE, 0, uint64(off), uint64(n), data)
			default:
				p.read = true
				cookie = c.send(wire.NBD_CMD_READ, 0, uint64(off), uint64(n), nil)
			}
			open[cookie], busy[s] = p, true
		}
		for len(open) > 0 {
			finish()
		}
		if !bytes.Equal(d.content(), model) {
			t.Error("volume differs from the model")
		}
		c.disconnect()
	})
}

// receiveChunkFor is receiveChunk when the request is known only by its cookie.
func (c *client) receiveChunkFor(length func(cookie uint64) int) message {
	c.t.Helper()
	if c.headers != wire.Simple {
		b := c.read(4)
		if binary.BigEndian.Uint32(b) == wire.NBD_SIMPLE_REPLY_MAGIC {
			b = c.read(12)
			return message{simple: true, flags: wire.NBD_REPLY_FLAG_DONE, errno: wire.Errno(binary.BigEndian.Uint32(b)), cookie: binary.BigEndian.Uint64(b[4:])}
		}
		if c.headers == wire.Structured {
			b = c.read(16)
			return c.finishChunk(b, 0, uint64(binary.BigEndian.Uint32(b[12:])))
		}
		b = c.read(28)
		return c.finishChunk(b, binary.BigEndian.Uint64(b[12:]), binary.BigEndian.Uint64(b[20:]))
	}
	b := c.read(16)
	r := message{simple: true, flags: wire.NBD_REPLY_FLAG_DONE, errno: wire.Errno(binary.BigEndian.Uint32(b[4:])), cookie: binary.BigEndian.Uint64(b[8:])}
	if n := length(r.cookie); r.errno == 0 && n > 0 {
		r.payload = c.read(n)
	}
	return r
}

func TestBlockStatus(t *testing.T) {
	const size = 6 << 30 // longer than 32 bits tell
	for _, headers := range []wire.Headers{wire.Structured, wire.Extended} {
		st := newStore(nil)
		big := &sparse{size: size, data: [][2]int64{{4096, 8192}, {mib, 2 * mib}, {5 << 30, 5<<30 + mib}}}
		h := serve(t, st, func(c *Config) { c.Volumes = sparseVolumes{big} })
		c := h.connect()
		c.negotiate(headers)
		const bitmap = contextBitmap + "s1"
		c.expectAck(wire.NBD_OPT_SET_META_CONTEXT, metaData("big", contextAllocation, bitmap))
		c.goExport("big")
		const hole = uint64(wire.NBD_STATE_HOLE | wire.NBD_STATE_ZERO)
		for _, x := range []struct {
			flags  uint16
			off, n uint64
			want   string
		}{
			{0, 0, mib, fmt.Sprint([][2]uint64{{4096, hole}, {4096, 0}, {mib - 8192, hole}})},
			{0, 100, 4096, fmt.Sprint([][2]uint64{{3996, hole}, {100, 0}})},
			{0, mib + 5, 10, fmt.Sprint([][2]uint64{{10, 0}})},
			{wire.NBD_CMD_FLAG_REQ_ONE, 0, mib, fmt.Sprint([][2]uint64{{4096, hole}})},
			{wire.NBD_CMD_FLAG_REQ_ONE, 0, 10, fmt.Sprint([][2]uint64{{10, hole}})},
			{0, size - 10, 10, fmt.Sprint([][2]uint64{{10, hole}})},
		} {
			list := c.reply(c.send(wire.NBD_CMD_BLOCK_STATUS, x.flags, x.off, x.n, nil), 0)
			if len(list) != 2 {
				t.Fatalf("%d chunks for two contexts", len(list))
			}
			if id, got := descriptors(t, c, list[0]); id != allocationID || fmt.Sprint(got) != x.want {
				t.Errorf("%s: status at %d+%d: context %d %v, want %v", headers, x.off, x.n, id, got, x.want)
			}
			if id, got := descriptors(t, c, list[1]); id == allocationID || got[0][1] > 1 {
				t.Errorf("%s: bitmap: context %d %v", headers, id, got)
			}
		}
		c.expect(wire.NBD_EINVAL, wire.NBD_CMD_BLOCK_STATUS, 0, size-10, 11, nil)
		c.expect(wire.NBD_EINVAL, wire.NBD_CMD_BLOCK_STATUS, 0, 0, 0, nil)
		c.expect(wire.NBD_EINVAL, wire.NBD_CMD_BLOCK_STATUS, wire.NBD_CMD_FLAG_DF, 0, 10, nil)
		if headers == wire.Extended {
			statusPayloads(t, c, size)
		}
		c.disconnect()
	}
}

// statusPayloads checks what only extended headers have: 64-bit lengths, and a
// selection of contexts by payload.
func statusPayloads(t *testing.T, c *client, size uint64) {
	t.Helper()
	list := c.reply(c.send(wire.NBD_CMD_BLOCK_STATUS, 0, 2*mib, size-2*mib, nil), 0)
	if _, got := descriptors(t, c, list[0]); got[0] != [2]uint64{5<<30 - 2*mib, 3} {
		t.Errorf("64-bit status: %v", got)
	}
	c.expect(0, wire.NBD_CMD_TRIM, 0, 0, size, nil)
	payload := func(n uint64, ids ...uint32) []byte {
		b := binary.BigEndian.AppendUint64(nil, n)
		for _, id := range ids {
			b = binary.BigEndian.AppendUint32(b, id)
		}
		return b
	}
	if c.flags&wire.NBD_FLAG_BLOCK_STATUS_PAYLOAD == 0 {
		t.Error("NBD_FLAG_BLOCK_STATUS_PAYLOAD is not set")
	}
	p := payload(mib, 2)
	list = c.reply(c.send(wire.NBD_CMD_BLOCK_STATUS, 0, 0, uint64(len(p)), p), 0)
	if id, _ := descriptors(t, c, list[0]); len(list) != 1 || id != 2 {
		t.Errorf("payload: %d chunks, first of context %d", len(list), id)
	}
	for _, p := range [][]byte{payload(mib, 9), payload(mib, 1, 1), payload(mib, 1, 2, 3), payload(mib), payload(0, 1), payload(size+1, 1), payload(mib, 1)[:11], payload(mib)[:7], make([]byte, 100_000)} {
		c.expect(wire.NBD_EINVAL, wire.NBD_CMD_BLOCK_STATUS, 0, 0, uint64(len(p)), p)
	}
}

// descriptors decodes a status chunk into (length, flags).
func descriptors(t *testing.T, c *client, r message) (id uint32, list [][2]uint64) {
	t.Helper()
	id = binary.BigEndian.Uint32(r.payload)
	switch r.typ {
	case wire.NBD_REPLY_TYPE_BLOCK_STATUS:
		for p := r.payload[4:]; len(p) > 0; p = p[8:] {
			list = append(list, [2]uint64{uint64(binary.BigEndian.Uint32(p)), uint64(binary.BigEndian.Uint32(p[4:]))})
		}
	case wire.NBD_REPLY_TYPE_BLOCK_STATUS_EXT:
		for p := r.payload[8:]; len(p) > 0; p = p[16:] {
			list = append(list, [2]uint64{binary.BigEndian.Uint64(p), binary.BigEndian.Uint64(p[8:])})
		}
		if n := binary.BigEndian.Uint32(r.payload[4:]); int(n) != len(list) {
			t.Errorf("%d descriptors, count says %d", len(list), n)
		}
	default:
		t.Fatalf("chunk of type %d, error %d %s", r.typ, r.errno, r.text)
	}
	if (r.typ == wire.NBD_REPLY_TYPE_BLOCK_STATUS_EXT) != (c.headers == wire.Extended) {
		t.Errorf("chunk of type %d under %s headers", r.typ, c.headers)
	}
	return id, list
}

// sparse is a volume of which only the extents are kept.
type sparse struct {
	size int64
	data [][2]int64
}

func (*sparse) Heard() {}

type sparseVolumes struct{ v *sparse }

func (v sparseVolumes) List(context.Context) ([]Export, error) { return nil, nil }
func (v sparseVolumes) Open(context.Context, string, string, string) (Volume, error) {
	return v.v, nil
}
func (v sparseVolumes) Snapshots(context.Context, string, string) ([]string, error) {
	return []string{"s1"}, nil
}

func (s *sparse) Size() int64           { return s.size }
func (s *sparse) ReadOnly() bool        { return false }
func (s *sparse) Close() error          { return nil }
func (s *sparse) Kick()                 {}
func (s *sparse) Submit(r *vdi.Request) { r.Done(r) }
func (s *sparse) Extents(_ context.Context, off, n int64, fn func(vdi.Extent) bool) error {
	at := off
	for _, d := range s.data {
		if d[1] <= at || d[0] >= off+n {
			continue
		}
		if d[0] > at && !fn(vdi.Extent{Off: at, Len: d[0] - at, Hole: true}) {
			return nil
		}
		at = max(at, d[0])
		if !fn(vdi.Extent{Off: at, Len: d[1] - at}) {
			return nil
		}
		at = d[1]
	}
	if at < off+n {
		fn(vdi.Extent{Off: at, Len: off + n - at, Hole: true})
	}
	return nil
}
func (s *sparse) Changed(_ context.Context, _ string, off, n int64, fn func(vdi.ChangedExtent) bool) error {
	fn(vdi.ChangedExtent{Off: off, Len: n, Changed: true})
	return nil
}

func TestAllocationState(t *testing.T) {
	for e, want := range map[vdi.Extent]uint32{
		{Hole: true, Zero: true}: wire.NBD_STATE_HOLE | wire.NBD_STATE_ZERO, {Hole: true}: wire.NBD_STATE_HOLE | wire.NBD_STATE_ZERO,
		{Zero: true}: wire.NBD_STATE_ZERO, {}: 0,
	} {
		if got := allocationState(e); got != want {
			t.Errorf("%+v: %d, want %d", e, got, want)
		}
	}
}

func TestStatusIsBounded(t *testing.T) {
	const blocks = 3 * maxStatus
	st := newStore(map[string]int64{"vm1": blocks * testBlock})
	d := st.disk("vm1")
	for i := range d.present {
		d.present[i] = i%2 == 0
	}
	h := serve(t, st, nil)
	c := h.connect()
	c.negotiate(wire.Structured)
	c.expectAck(wire.NBD_OPT_SET_META_CONTEXT, metaData("vm1", contextAllocation))
	c.goExport("vm1")
	list := c.reply(c.send(wire.NBD_CMD_BLOCK_STATUS, 0, 0, blocks*testBlock, nil), 0)
	if _, got := descriptors(t, c, list[0]); len(got) != maxStatus {
		t.Errorf("%d descriptors, want %d", len(got), maxStatus)
	}
	c.disconnect()
}

func TestDirtyBitmap(t *testing.T) {
	st := newStore(map[string]int64{"vm1": mib})
	st.snapshot("vm1", "s1")
	h := serve(t, st, nil)
	c := h.connect()
	c.negotiate(wire.Structured)
	c.expectAck(wire.NBD_OPT_SET_META_CONTEXT, metaData("vm1", contextBitmap+"s1"))
	c.goExport("vm1")
	c.expect(0, wire.NBD_CMD_WRITE, 0, 8192, 4096, random(4096))
	list := c.reply(c.send(wire.NBD_CMD_BLOCK_STATUS, 0, 0, mib, nil), 0)
	if _, got := descriptors(t, c, list[0]); fmt.Sprint(got) != fmt.Sprint([][2]uint64{{8192, 0}, {4096, 1}, {mib - 12288, 0}}) {
		t.Errorf("bitmap: %v", got)
	}
	c.disconnect()
}

// The end of a session ends block status requests that nobody waits for any more.
func TestStatusEndsWithTheSession(t *testing.T) {
	st := newStore(map[string]int64{"vm1": mib})
	waiting := make(chan struct{}, 2*maxSlow)
	st.disk("vm1").wait = func(ctx context.Context) error {
		waiting <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	}
	h := serve(t, st, nil)
	c := h.connect()
	c.negotiate(wire.Structured)
	c.expectAck(wire.NBD_OPT_SET_META_CONTEXT, metaData("vm1", contextAllocation))
	c.goExport("vm1")
	for range maxSlow {
		c.send(wire.NBD_CMD_BLOCK_STATUS, 0, 0, mib, nil)
	}
	for range maxSlow {
		<-waiting
	}
	c.conn.Close()
	h.eventually("session stays", func() bool { return h.Counters().Connections == 0 })
}

// A size that changes is seen by those who connect afterwards.
func TestResize(t *testing.T) {
	st := newStore(map[string]int64{"vm1": 2 * mib})
	h := serve(t, st, nil)
	old := h.open("vm1", wire.Structured)
	d := st.disk("vm1")
	d.mu.Lock()
	d.data, d.present = make([]byte, 4*mib), make([]bool, 4*mib/testBlock)
	d.mu.Unlock()
	young := h.open("vm1", wire.Structured)
	if old.size != 2*mib || young.size != 4*mib {
		t.Errorf("sizes %d and %d", old.size, young.size)
	}
	old.expect(wire.NBD_EINVAL, wire.NBD_CMD_READ, 0, 3*mib, 512, nil)
	young.expect(0, wire.NBD_CMD_WRITE, 0, 3*mib, 512, make([]byte, 512))
	d.mu.Lock()
	d.data = d.data[:mib]
	d.mu.Unlock()
	old.expect(wire.NBD_EINVAL, wire.NBD_CMD_READ, 0, mib, 512, nil)
	young.disconnect()
	old.disconnect()
}

func TestSessionsAndCounters(t *testing.T) {
	st := newStore(map[string]int64{"vm1": mib})
	st.snapshot("vm1", "s1")
	h := serve(t, st, nil)
	a := h.open("vm1", wire.Extended)
	a.expect(0, wire.NBD_CMD_WRITE, 0, 0, 4096, make([]byte, 4096))
	a.expect(0, wire.NBD_CMD_FLUSH, 0, 0, 0, nil) // its session is known before the next one's
	b := h.connect()
	b.negotiate(wire.Structured)
	b.expectAck(wire.NBD_OPT_SET_META_CONTEXT, metaData("vm1@s1", contextAllocation))
	b.goExport("vm1@s1")
	b.readData(0, 0, 512)
	b.expect(wire.NBD_EINVAL, 77, 0, 0, 0, nil)
	list := h.Sessions()
	if len(list) != 2 || list[0].ID >= list[1].ID {
		t.Fatalf("sessions: %+v", list)
	}
	x, y := list[0], list[1]
	if x.Export != "vm1" || x.Headers != "extended" || x.ReadOnly || x.Peer != "unix" || x.WrittenBytes != 4096 || x.Requests != (Requests{Write: 1, Flush: 1}) || x.Size != mib {
		t.Errorf("session: %+v", x)
	}
	if y.Export != "vm1@s1" || y.Headers != "structured" || !y.ReadOnly || fmt.Sprint(y.Contexts) != "[base:allocation]" || y.ReadBytes != 512 || y.Errors != 1 || y.Requests.Unknown != 1 {
		t.Errorf("session: %+v", y)
	}
	a.disconnect()
	h.eventually("session stays", func() bool { return len(h.Sessions()) == 1 })
	if c := h.Counters(); c.Requests.Write != 1 || c.Requests.Read != 1 || c.WrittenBytes != 4096 || c.ReadBytes != 512 || c.Sessions != 1 || c.Accepted != 2 {
		t.Errorf("counters: %+v", c)
	}
	b.disconnect()
}

// Shutdown answers what it has received, and takes nothing more.
func TestShutdownDrains(t *testing.T) {
	st := newStore(map[string]int64{"vm1": mib})
	d := st.disk("vm1")
	d.hold = make(chan struct{})
	h := serve(t, st, nil)
	c := h.open("vm1", wire.Structured)
	var cookies []uint64
	for range 20 {
		cookies = append(cookies, c.send(wire.NBD_CMD_WRITE, 0, 0, 4096, random(4096)))
	}
	h.eventually("requests do not arrive", func() bool { return h.Counters().InFlight == 20 })
	over := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
		defer cancel()
		over <- h.Shutdown(ctx)
	}()
	h.eventually("no shutdown", func() bool { return h.clients.Context().Err() != nil })
	select {
	case err := <-over:
		t.Fatalf("shutdown did not wait: %v", err)
	default:
	}
	close(d.hold)
	got := map[uint64]bool{}
	for range cookies {
		r := c.receiveChunk(0)
		got[r.cookie] = r.errno == 0
	}
	for _, cookie := range cookies {
		if !got[cookie] {
			t.Errorf("request %d was not answered well", cookie)
		}
	}
	c.expectClosed()
	if err := <-over; err != nil {
		t.Errorf("shutdown: %v", err)
	}
	if _, err := net.Dial("unix", h.addr.String()); err == nil {
		t.Error("server still accepts")
	}
}
