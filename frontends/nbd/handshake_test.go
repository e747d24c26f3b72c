package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"sheepdog/frontends/nbd/internal/wire"
	"sheepdog/vdi"
)

const mib = 1 << 20

func TestExportName(t *testing.T) {
	h := serve(t, newStore(map[string]int64{"vm1": 3 * mib}), nil)
	for _, flags := range []uint32{0, wire.NBD_FLAG_C_FIXED_NEWSTYLE, wire.NBD_FLAG_C_FIXED_NEWSTYLE | wire.NBD_FLAG_C_NO_ZEROES} {
		c := h.dial()
		c.greet(flags)
		c.write(optionMessage(wire.NBD_OPT_EXPORT_NAME, []byte("vm1")))
		b := c.read(10)
		if size := binary.BigEndian.Uint64(b); size != 3*mib {
			t.Errorf("size is %d", size)
		}
		if flags&wire.NBD_FLAG_C_NO_ZEROES == 0 {
			if pad := c.read(wire.NewstyleZeroes); !bytes.Equal(pad, make([]byte, wire.NewstyleZeroes)) {
				t.Errorf("padding is %x", pad)
			}
		}
		c.expect(0, wire.NBD_CMD_FLUSH, 0, 0, 0, nil)
		c.disconnect()
	}
}

func TestExportNameFailuresClose(t *testing.T) {
	h := serve(t, newStore(map[string]int64{"vm1": mib}), nil)
	for _, name := range []string{"", "vm2", "vm1@none", "a\x00b", "\xff\xfe", strings.Repeat("n", wire.MaxString+1), strings.Repeat("n", maxOptionData+1)} {
		c := h.connect()
		c.write(optionMessage(wire.NBD_OPT_EXPORT_NAME, []byte(name)))
		c.expectClosed()
	}
	c := h.connect()
	c.negotiate(wire.Extended)
	c.write(optionMessage(wire.NBD_OPT_EXPORT_NAME, []byte("vm1")))
	c.expectClosed()
}

func TestClientFlags(t *testing.T) {
	h := serve(t, newStore(map[string]int64{"vm1": mib}), nil)
	c := h.dial()
	c.greet(1 << 2)
	c.expectClosed()
	c = h.dial()
	c.greet(0) // not fixed newstyle: nothing but NBD_OPT_EXPORT_NAME
	c.write(optionMessage(wire.NBD_OPT_LIST, nil))
	c.expectClosed()
}

func TestInfoAndGo(t *testing.T) {
	st := newStore(map[string]int64{"vm1": 5 * mib, "odd@name": mib})
	st.snapshot("vm1", "s1")
	h := serve(t, st, nil)
	all := []uint16{wire.NBD_INFO_EXPORT, wire.NBD_INFO_NAME, wire.NBD_INFO_DESCRIPTION, wire.NBD_INFO_BLOCK_SIZE, 4711}
	writable := uint16(wire.NBD_FLAG_HAS_FLAGS | wire.NBD_FLAG_SEND_FLUSH | wire.NBD_FLAG_SEND_FUA | wire.NBD_FLAG_SEND_TRIM | wire.NBD_FLAG_SEND_WRITE_ZEROES |
		wire.NBD_FLAG_CAN_MULTI_CONN | wire.NBD_FLAG_SEND_CACHE | wire.NBD_FLAG_SEND_FAST_ZERO)
	frozen := uint16(wire.NBD_FLAG_HAS_FLAGS | wire.NBD_FLAG_READ_ONLY | wire.NBD_FLAG_SEND_FLUSH | wire.NBD_FLAG_SEND_FUA | wire.NBD_FLAG_CAN_MULTI_CONN | wire.NBD_FLAG_SEND_CACHE)
	for _, x := range []struct {
		export  string
		headers wire.Headers
		size    uint64
		flags   uint16
	}{
		{"vm1", wire.Simple, 5 * mib, writable},
		{"vm1", wire.Structured, 5 * mib, writable | wire.NBD_FLAG_SEND_DF},
		{"vm1", wire.Extended, 5 * mib, writable | wire.NBD_FLAG_SEND_DF},
		{"vm1@s1", wire.Structured, 5 * mib, frozen | wire.NBD_FLAG_SEND_DF},
		{"odd@name", wire.Simple, mib, writable},
	} {
		c := h.connect()
		c.negotiate(x.headers)
		info := c.expectAck(wire.NBD_OPT_INFO, infoData(x.export, all...))
		again := c.goExport(x.export, all...)
		if c.size != x.size || c.flags != x.flags {
			t.Errorf("%s: size %d flags %#x, want %d %#x", x.export, c.size, c.flags, x.size, x.flags)
		}
		for i := range info {
			if !bytes.Equal(info[i].data, again[i].data) {
				t.Errorf("INFO and GO differ: %x %x", info[i].data, again[i].data)
			}
		}
		got := map[uint16][]byte{}
		for _, r := range again[:len(again)-1] {
			got[binary.BigEndian.Uint16(r.data)] = r.data[2:]
		}
		if len(got) != 4 || string(got[wire.NBD_INFO_NAME]) != x.export || !strings.Contains(string(got[wire.NBD_INFO_DESCRIPTION]), x.export) {
			t.Errorf("information: %v", got)
		}
		if want := []byte{0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0}; !bytes.Equal(got[wire.NBD_INFO_BLOCK_SIZE], want) {
			t.Errorf("block sizes: %x", got[wire.NBD_INFO_BLOCK_SIZE])
		}
		c.disconnect()
	}
}

func TestInfoWithoutRequestsSendsOnlyExport(t *testing.T) {
	h := serve(t, newStore(map[string]int64{"vm1": mib}), nil)
	if list := h.connect().expectAck(wire.NBD_OPT_INFO, infoData("vm1")); len(list) != 2 {
		t.Errorf("%d replies, want 2", len(list))
	}
}

func TestOptionErrors(t *testing.T) {
	h := serve(t, newStore(map[string]int64{"vm1": mib}), nil)
	c := h.connect()
	long := make([]byte, maxOptionData+1)
	for _, x := range []struct {
		what   string
		option uint32
		data   []byte
		rep    uint32
	}{
		{"unknown option", 4242, []byte("data"), wire.NBD_REP_ERR_UNSUP},
		{"withdrawn option", 4, nil, wire.NBD_REP_ERR_UNSUP},
		{"long unknown option", 4242, long, wire.NBD_REP_ERR_TOO_BIG},
		{"list with data", wire.NBD_OPT_LIST, []byte{1}, wire.NBD_REP_ERR_INVALID},
		{"structured reply with data", wire.NBD_OPT_STRUCTURED_REPLY, []byte{1}, wire.NBD_REP_ERR_INVALID},
		{"extended headers with data", wire.NBD_OPT_EXTENDED_HEADERS, []byte{1}, wire.NBD_REP_ERR_INVALID},
		{"TLS without a certificate", wire.NBD_OPT_STARTTLS, nil, wire.NBD_REP_ERR_POLICY},
		{"TLS with data", wire.NBD_OPT_STARTTLS, []byte{1}, wire.NBD_REP_ERR_INVALID},
		{"default export", wire.NBD_OPT_INFO, infoData(""), wire.NBD_REP_ERR_UNKNOWN},
		{"default export", wire.NBD_OPT_GO, infoData(""), wire.NBD_REP_ERR_UNKNOWN},
		{"no such VDI", wire.NBD_OPT_GO, infoData("vm2"), wire.NBD_REP_ERR_UNKNOWN},
		{"no such snapshot", wire.NBD_OPT_GO, infoData("vm1@s9"), wire.NBD_REP_ERR_UNKNOWN},
		{"empty option", wire.NBD_OPT_GO, nil, wire.NBD_REP_ERR_INVALID},
		{"name beyond the option", wire.NBD_OPT_GO, []byte{0, 0, 0, 9, 'v', 'm', '1', 0, 0}, wire.NBD_REP_ERR_INVALID},
		{"name of 4 GiB", wire.NBD_OPT_GO, []byte{255, 255, 255, 255, 'v', 'm', '1', 0, 0}, wire.NBD_REP_ERR_INVALID},
		{"requests beyond the option", wire.NBD_OPT_GO, append(infoData("vm1")[:7], 0, 9), wire.NBD_REP_ERR_INVALID},
		{"more than the requests", wire.NBD_OPT_GO, append(infoData("vm1"), 0), wire.NBD_REP_ERR_INVALID},
		{"name with NUL", wire.NBD_OPT_GO, infoData("v\x001"), wire.NBD_REP_ERR_INVALID},
		{"name not UTF-8", wire.NBD_OPT_GO, infoData("v\xff1"), wire.NBD_REP_ERR_INVALID},
		{"name too long", wire.NBD_OPT_GO, infoData(strings.Repeat("n", wire.MaxString+1)), wire.NBD_REP_ERR_INVALID},
		{"contexts without structured replies", wire.NBD_OPT_SET_META_CONTEXT, metaData("vm1", contextAllocation), wire.NBD_REP_ERR_INVALID},
	} {
		list := c.expectOption(x.option, x.data, x.rep)
		if last := list[len(list)-1]; len(last.data) == 0 || len(list) != 1 {
			t.Errorf("%s: %d replies, message %q", x.what, len(list), last.data)
		}
	}
	// After all that the connection still serves.
	c.goExport("vm1")
	c.disconnect()
}

func TestHeadersTakePrecedence(t *testing.T) {
	h := serve(t, newStore(map[string]int64{"vm1": mib}), nil)
	c := h.connect()
	c.negotiate(wire.Structured)
	c.negotiate(wire.Extended)
	c.expectOption(wire.NBD_OPT_STRUCTURED_REPLY, nil, wire.NBD_REP_ERR_EXT_HEADER_REQD)
	c.goExport("vm1")
	c.expect(0, wire.NBD_CMD_FLUSH, 0, 0, 0, nil)
	c.disconnect()
}

func TestAbort(t *testing.T) {
	h := serve(t, newStore(map[string]int64{"vm1": mib}), nil)
	c := h.connect()
	c.expectAck(wire.NBD_OPT_ABORT, []byte("data is ignored"))
	c.expectClosed()
	if n := h.Counters().Failed; n != 0 {
		t.Errorf("an abort counts as %d failures", n)
	}
}

func TestList(t *testing.T) {
	st := newStore(map[string]int64{"vm1": mib, "vm2": 2 * mib})
	st.snapshot("vm1", "s1")
	for i := range 2000 { // more than one piece
		name := fmt.Sprintf("zz-%04d-%s", i, strings.Repeat("x", 80))
		st.disks[name] = newDisk(name, 4096)
	}
	h := serve(t, st, nil)
	list := h.connect().expectAck(wire.NBD_OPT_LIST, nil)
	var names []string
	for _, r := range list[:len(list)-1] {
		n := binary.BigEndian.Uint32(r.data)
		names = append(names, string(r.data[4:4+n]))
		if r.rep != wire.NBD_REP_SERVER || len(r.data) == int(4+n) {
			t.Fatalf("reply %#x without a description: %q", r.rep, r.data)
		}
	}
	if len(names) != 2003 || !slices.Equal(names[:3], []string{"vm1", "vm1@s1", "vm2"}) {
		t.Errorf("%d exports, first %q", len(names), names[:3])
	}
}

func TestMetaContexts(t *testing.T) {
	st := newStore(map[string]int64{"vm1": mib, "vm2": mib})
	st.snapshot("vm1", "s1")
	st.snapshot("vm1", "s2")
	h := serve(t, st, nil)
	const s1, s2 = "qemu:dirty-bitmap:s1", "qemu:dirty-bitmap:s2"
	names := func(list []optionReply) (names []string) {
		ids := map[uint32]bool{}
		for _, r := range list[:len(list)-1] {
			id := binary.BigEndian.Uint32(r.data)
			if r.option == wire.NBD_OPT_SET_META_CONTEXT && ids[id] {
				t.Errorf("id %d twice", id)
			}
			ids[id] = true
			names = append(names, string(r.data[4:]))
		}
		return names
	}
	for _, x := range []struct {
		option  uint32
		export  string
		queries []string
		want    []string
	}{
		{wire.NBD_OPT_LIST_META_CONTEXT, "vm1", nil, []string{contextAllocation, s1, s2}},
		{wire.NBD_OPT_LIST_META_CONTEXT, "vm2", nil, []string{contextAllocation}},
		{wire.NBD_OPT_LIST_META_CONTEXT, "vm1", []string{"base:"}, []string{contextAllocation}},
		{wire.NBD_OPT_LIST_META_CONTEXT, "vm1", []string{"base:none"}, nil},
		{wire.NBD_OPT_LIST_META_CONTEXT, "vm1", []string{"qemu:"}, []string{s1, s2}},
		{wire.NBD_OPT_LIST_META_CONTEXT, "vm1", []string{"qemu:dirty-bitmap:"}, []string{s1, s2}},
		{wire.NBD_OPT_LIST_META_CONTEXT, "vm1", []string{s2, "x-other:thing"}, []string{s2}},
		{wire.NBD_OPT_LIST_META_CONTEXT, "vm1", []string{"qemu:dirty-bitmap:s"}, nil},
		{wire.NBD_OPT_SET_META_CONTEXT, "vm1", nil, nil},
		{wire.NBD_OPT_SET_META_CONTEXT, "vm1", []string{"base:", "qemu:", "qemu:dirty-bitmap:"}, nil},
		{wire.NBD_OPT_SET_META_CONTEXT, "vm1", []string{contextAllocation, contextAllocation, s2}, []string{contextAllocation, s2}},
	} {
		for _, headers := range []wire.Headers{wire.Structured, wire.Extended} {
			c := h.connect()
			c.negotiate(headers)
			if got := names(c.expectAck(x.option, metaData(x.export, x.queries...))); !slices.Equal(got, x.want) {
				t.Errorf("option %d %q %q: %q, want %q", x.option, x.export, x.queries, got, x.want)
			}
			c.expectAck(wire.NBD_OPT_ABORT, nil)
		}
	}
}

func TestMetaContextErrors(t *testing.T) {
	st := newStore(map[string]int64{"vm1": mib})
	var every []string
	for i := range maxContexts + 1 {
		tag := fmt.Sprintf("s%d", i)
		st.snapshot("vm1", tag)
		every = append(every, contextBitmap+tag)
	}
	h := serve(t, st, nil)
	c := h.connect()
	c.negotiate(wire.Structured)
	set, list := wire.NBD_OPT_SET_META_CONTEXT, wire.NBD_OPT_LIST_META_CONTEXT
	c.expectOption(set, metaData("vm1", every...), wire.NBD_REP_ERR_TOO_BIG)
	c.expectOption(list, metaData("vm1", slices.Repeat([]string{"a:"}, maxQueries+1)...), wire.NBD_REP_ERR_TOO_BIG)
	for _, option := range []uint32{set, list} {
		c.expectOption(option, metaData("vm9", contextAllocation), wire.NBD_REP_ERR_UNKNOWN)
		c.expectOption(option, metaData("vm1", "no namespace"), wire.NBD_REP_ERR_INVALID)
		c.expectOption(option, metaData("vm1", ":leaf"), wire.NBD_REP_ERR_INVALID)
		c.expectOption(option, metaData("vm1", "base:\xff"), wire.NBD_REP_ERR_INVALID)
		c.expectOption(option, nil, wire.NBD_REP_ERR_INVALID)
		c.expectOption(option, append(metaData("vm1", contextAllocation), 0), wire.NBD_REP_ERR_INVALID)
		c.expectOption(option, metaData("vm1", contextAllocation)[:20], wire.NBD_REP_ERR_INVALID)
		many := metaData("vm1")
		binary.BigEndian.PutUint32(many[7:], 1<<31)
		c.expectOption(option, many, wire.NBD_REP_ERR_INVALID)
	}
}

// Contexts hold for the export that they were selected for, until the next selection,
// even one that fails.
func TestMetaContextsAreForgotten(t *testing.T) {
	st := newStore(map[string]int64{"vm1": mib, "vm2": mib})
	h := serve(t, st, nil)
	for _, x := range []struct {
		what   string
		after  func(c *client)
		export string
		want   wire.Errno
	}{
		{"kept", func(c *client) {}, "vm1", 0},
		{"other export", func(c *client) {}, "vm2", wire.NBD_EINVAL},
		{"none selected", func(c *client) { c.expectAck(wire.NBD_OPT_SET_META_CONTEXT, metaData("vm1")) }, "vm1", wire.NBD_EINVAL},
		{"failed selection", func(c *client) {
			c.expectOption(wire.NBD_OPT_SET_META_CONTEXT, metaData("vm1", "bad"), wire.NBD_REP_ERR_INVALID)
		}, "vm1", wire.NBD_EINVAL},
	} {
		c := h.connect()
		c.negotiate(wire.Structured)
		c.expectAck(wire.NBD_OPT_SET_META_CONTEXT, metaData("vm1", contextAllocation))
		x.after(c)
		c.goExport(x.export)
		if got := c.do(wire.NBD_CMD_BLOCK_STATUS, 0, 0, 4096, nil); got != x.want {
			t.Errorf("%s: block status gives error %d, want %d", x.what, got, x.want)
		}
		c.disconnect()
	}
}

func TestOpenFailures(t *testing.T) {
	for _, r := range results {
		st := newStore(map[string]int64{"vm1": mib})
		h := serve(t, st, nil)
		st.fail = fmt.Errorf("open volume: %w", r.kind)
		want := r.option
		c := h.connect()
		list := c.expectOption(wire.NBD_OPT_GO, infoData("vm1"), want)
		if msg := string(list[0].data); !strings.Contains(msg, r.kind.Error()) {
			t.Errorf("%v: message is %q", r.kind, msg)
		}
		if !errors.Is(r.kind, vdi.ErrNotFound) {
			c.expectOption(wire.NBD_OPT_LIST, nil, want)
		}
	}
}

func TestHandshakeTimeout(t *testing.T) {
	h := serve(t, newStore(nil), func(c *Config) { c.HandshakeTimeout = 30 * time.Millisecond })
	c := h.connect()
	c.expectClosed()
	c = h.dial()
	c.read(wire.GreetingSize)
	c.expectClosed()
}

// Who is told about one export after another has all the time that it takes (nbdinfo --list needs 0.2 s for each);
// whoever only keeps the connection busy has not.
func TestHandshakeTimeoutOfLongLists(t *testing.T) {
	const limit = 300 * time.Millisecond
	h := serve(t, newStore(map[string]int64{"vm1": mib}), func(c *Config) { c.HandshakeTimeout = limit })
	ask := func(c *client, option uint32, data []byte) error {
		if _, err := c.conn.Write(optionMessage(option, data)); err != nil {
			return err
		}
		_, err := c.conn.Read(make([]byte, 4096))
		return err
	}
	c := h.connect()
	for began, last := time.Now(), time.Now(); time.Since(began) < 3*limit; time.Sleep(limit / 10) {
		err := ask(c, wire.NBD_OPT_INFO, infoData("vm1"))
		switch late := time.Since(last); {
		case err == nil:
			last = time.Now()
		case late < limit/2:
			t.Fatalf("after %v: %v", time.Since(began), err)
		default:
			t.Logf("the machine is busy: it was asked %v late: from the beginning", late)
			c = h.connect()
			began, last = time.Now(), time.Now()
		}
	}
	c = h.connect()
	for began := time.Now(); ; time.Sleep(limit / 10) {
		if err := ask(c, wire.NBD_OPT_INFO, infoData("nosuch")); err != nil {
			break
		}
		if time.Since(began) > testTimeout/2 {
			t.Fatal("the handshake has no end")
		}
	}
}

func TestShutdownDuringHandshake(t *testing.T) {
	h := serve(t, newStore(map[string]int64{"vm1": mib}), nil)
	c := h.connect()
	c.expectAck(wire.NBD_OPT_STRUCTURED_REPLY, nil)
	ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
	defer cancel()
	if err := h.Shutdown(ctx); err != nil {
		t.Fatal(err)
	}
	c.expectClosed()
}
