package wire

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite testdata")

// TestGolden keeps every message that the server can send, byte by byte.
func TestGolden(t *testing.T) {
	var out strings.Builder
	show := func(what string, b []byte) { fmt.Fprintf(&out, "%s\n%s\n", what, hex.Dump(b)) }
	fixed := func(n int, put func(b []byte)) []byte {
		b := make([]byte, n)
		put(b)
		return b
	}
	show("greeting", AppendGreeting(nil, NBD_FLAG_FIXED_NEWSTYLE|NBD_FLAG_NO_ZEROES))
	show("export name", AppendExportName(nil, 1<<40, 0x1234, true))
	show("export name with zeroes", AppendExportName(nil, 1<<40, 0x1234, false))
	show("ack", AppendOptionReply(nil, NBD_OPT_LIST, NBD_REP_ACK, nil))
	show("error", AppendError(nil, NBD_OPT_GO, NBD_REP_ERR_UNKNOWN, "no such export"))
	show("server", AppendServer(nil, "vm1", "VDI vm1"))
	show("meta context", AppendMetaContext(nil, NBD_OPT_SET_META_CONTEXT, 7, "base:allocation"))
	show("info export", AppendInfoExport(nil, NBD_OPT_GO, 1<<40, 0x1234))
	show("info name", AppendInfoString(nil, NBD_OPT_INFO, NBD_INFO_NAME, "vm1"))
	show("info block size", AppendInfoBlockSize(nil, NBD_OPT_GO, 1, 4096, 1<<25))
	show("simple reply", fixed(SimpleReplySize, func(b []byte) { PutSimpleReply(b, 0x1122334455667788, NBD_ENOSPC) }))
	const cookie, offset = 0x1122334455667788, 0x100000
	for _, h := range []Headers{Simple, Structured, Extended} {
		show(h.String()+" done", fixed(h.DoneSize(), func(b []byte) { h.PutDone(b, cookie, offset) }))
		show(h.String()+" read head", fixed(h.ReadHeadSize(), func(b []byte) { h.PutReadHead(b, NBD_REPLY_FLAG_DONE, cookie, offset, offset+512, 4096) }))
		show(h.String()+" error", h.AppendErrorReply(nil, cookie, offset, NBD_EIO, "disk failed"))
		if h == Simple {
			continue
		}
		show(h.String()+" hole", fixed(h.HoleSize(), func(b []byte) { h.PutHole(b, 0, cookie, offset, offset+512, 4096) }))
		show(h.String()+" block status", h.AppendBlockStatus(nil, NBD_REPLY_FLAG_DONE, cookie, offset, 1, []Status{{4096, NBD_STATE_HOLE | NBD_STATE_ZERO}, {512, 0}}))
	}
	const file = "testdata/messages.txt"
	if *update {
		if err := os.WriteFile(file, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if out.String() != string(want) {
		t.Errorf("messages differ from %s (run with -update if that is meant):\n%s", file, out.String())
	}
}

func TestParseRequest(t *testing.T) {
	b := []byte{0x25, 0x60, 0x95, 0x13, 0, 1, 0, 6, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 16, 0}
	want := Request{Flags: NBD_CMD_FLAG_FUA, Type: NBD_CMD_WRITE_ZEROES, Cookie: 0x0102030405060708, Offset: 1 << 32, Length: 4096}
	for _, h := range []Headers{Simple, Structured} {
		if r, ok := h.ParseRequest(b); !ok || r != want {
			t.Errorf("%s: %+v %v", h, r, ok)
		}
	}
	x := []byte{0x21, 0xe4, 0x1c, 0x71, 0, 1, 0, 6, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0}
	want.Length = 1 << 40
	if r, ok := Extended.ParseRequest(x); !ok || r != want {
		t.Errorf("extended: %+v %v", r, ok)
	}
	if _, ok := Extended.ParseRequest(append(b, 0, 0, 0, 0)); ok {
		t.Error("compact request is taken for an extended one")
	}
	if _, ok := Simple.ParseRequest(x); ok {
		t.Error("extended request is taken for a compact one")
	}
}

func TestStatusPayload(t *testing.T) {
	b := binary.BigEndian.AppendUint64(nil, 1<<40)
	b = binary.BigEndian.AppendUint32(b, 3)
	b = binary.BigEndian.AppendUint32(b, 1)
	n, ids, err := ParseStatusPayload(b, make([]uint32, 0, 2))
	if err != nil || n != 1<<40 || fmt.Sprint(ids) != "[3 1]" {
		t.Errorf("%d %v %v", n, ids, err)
	}
	for _, bad := range [][]byte{nil, b[:7], b[:13], append(bytes.Clone(b), 0, 0, 0, 9), append(bytes.Clone(b[:12]), 0, 0, 0, 3)} {
		if _, _, err := ParseStatusPayload(bad, make([]uint32, 0, 2)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%x: %v", bad, err)
		}
	}
}

func TestTruncate(t *testing.T) {
	for _, s := range []string{"", "short", strings.Repeat("ä", MaxString), "x" + strings.Repeat("€", MaxString)} {
		if got := Truncate(s); CheckString([]byte(got)) != nil || !strings.HasPrefix(s, got) || len(s) > MaxString && len(got) < MaxString-3 {
			t.Errorf("%d bytes became %d", len(s), len(got))
		}
	}
}

// FuzzOptions checks that whatever parses is what its parts encode to.
func FuzzOptions(f *testing.F) {
	f.Add([]byte{0, 0, 0, 3, 'v', 'm', '1', 0, 1, 0, 3})
	f.Add([]byte{0, 0, 0, 3, 'v', 'm', '1', 0, 0, 0, 1, 0, 0, 0, 5, 'b', 'a', 's', 'e', ':'})
	f.Add([]byte{255, 255, 255, 255, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		if q, err := ParseInfoRequest(data); err == nil {
			b := binary.BigEndian.AppendUint32(nil, uint32(len(q.Name)))
			b = append(b, q.Name...)
			b = binary.BigEndian.AppendUint16(b, uint16(len(q.Infos)))
			for _, i := range q.Infos {
				b = binary.BigEndian.AppendUint16(b, i)
			}
			if !bytes.Equal(b, data) || CheckString([]byte(q.Name)) != nil {
				t.Errorf("%x parsed as %+v", data, q)
			}
		} else if !errors.Is(err, ErrMalformed) {
			t.Error(err)
		}
		if q, err := ParseMetaRequest(data); err == nil {
			b := binary.BigEndian.AppendUint32(nil, uint32(len(q.Name)))
			b = append(b, q.Name...)
			b = binary.BigEndian.AppendUint32(b, uint32(len(q.Queries)))
			for _, s := range q.Queries {
				b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
				b = append(b, s...)
			}
			if !bytes.Equal(b, data) {
				t.Errorf("%x parsed as %+v", data, q)
			}
		} else if !errors.Is(err, ErrMalformed) {
			t.Error(err)
		}
		if len(data) >= OptionHeaderSize {
			if h, err := ParseOptionHeader(data); err == nil && (binary.BigEndian.Uint32(data[8:]) != h.Option || binary.BigEndian.Uint32(data[12:]) != h.Length) {
				t.Errorf("%x parsed as %+v", data, h)
			}
		}
		_, ids, err := ParseStatusPayload(data, make([]uint32, 0, 4))
		if err == nil && len(data) != 8+4*len(ids) {
			t.Errorf("%x parsed as %v", data, ids)
		}
	})
}
