package wire

import (
	"encoding/hex"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"
)

// unhex reads a file of hex digits, with offsets and comments.
func unhex(t *testing.T, name string) []byte {
	t.Helper()
	text, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	var digits strings.Builder
	for line := range strings.Lines(string(text)) {
		line, _, _ = strings.Cut(line, "#")
		digits.WriteString(strings.Join(strings.Fields(line), ""))
	}
	b, err := hex.DecodeString(digits.String())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestRequests(t *testing.T) {
	b := unhex(t, "requests.hex")
	r := ParseRequest(b)
	want := Request{ProtoVer: 0, Op: SD_OP_CREATE_AND_WRITE_OBJ, Flags: SD_FLAG_CMD_WRITE | SD_FLAG_CMD_COW | SD_FLAG_CMD_CACHE, ID: 0x11223344, DataLength: 4096, body: r.body}
	if r != want || !r.HasPayload() {
		t.Errorf("%+v", r)
	}
	if o, want := r.Object(), (ObjectRequest{OID: 0x00c5988700000007, CowOID: 0x00c5988600000007, Copies: 3, Offset: 0x201000}); o != want {
		t.Errorf("%+v", o)
	}
	r = ParseRequest(b[HeaderSize:])
	if r.ProtoVer != 1 || r.Op != SD_OP_NEW_VDI || r.Epoch != 5 || r.DataLength != 256 {
		t.Errorf("%+v", r)
	}
	if v, want := r.VDI(), (VDIRequest{Size: 10 << 30, BaseVID: 0xc59887, Copies: 6, CopyPolicy: 0x22, StorePolicy: 1, BlockSizeShift: 22, SnapID: 1, Type: LOCK_TYPE_SHARED}); v != want {
		t.Errorf("%+v", v)
	}
}

func TestResponses(t *testing.T) {
	r := ParseRequest(unhex(t, "requests.hex"))
	var got []byte
	for _, put := range []func(b []byte){
		func(b []byte) { PutResponse(b, &r, SD_RES_READONLY, 0) },
		func(b []byte) { PutResponse(b, &r, SD_RES_SUCCESS, 4096); PutCopies(b, 3) },
		func(b []byte) { PutResponse(b, &r, SD_RES_SUCCESS, 0); PutVDI(b, 0xc59887, 3, 22) },
		func(b []byte) { PutResponse(b, &r, SD_RES_SUCCESS, 0); PutDefaults(b, 3, 0, 22) },
	} {
		b := make([]byte, HeaderSize)
		put(b)
		got = append(got, b...)
	}
	if want := unhex(t, "responses.hex"); hex.EncodeToString(got) != hex.EncodeToString(want) {
		t.Errorf("got\n%swant\n%s", dump(got), dump(want))
	}
}

func dump(b []byte) (s string) {
	for i := 0; i < len(b); i += 16 {
		s += fmt.Sprintf("% x\n", b[i:min(i+16, len(b))])
	}
	return s
}

func TestInode(t *testing.T) {
	h := InodeHeader{
		Name: "vm1", Tag: "before-upgrade", Created: time.Unix(0x5f5e1000, 7).UTC(), Snapped: time.Unix(0x5f5e1001, 0).UTC(), VMClock: 0x1122334455, Size: 10 << 30,
		VMStateSize: 3 << 20, CopyPolicy: 0x22, Copies: 3, BlockSizeShift: 22, SnapID: 2, VID: 0xc59887, ParentVID: 0xc59886,
	}
	b := make([]byte, InodeHeaderSize)
	h.Put(b)
	want := unhex(t, "inode.hex")
	fields := append(append(append([]byte(nil), b[:16]...), b[256:272]...), b[512:]...)
	if string(fields[:len(want)]) != string(want) {
		t.Errorf("got\n%swant\n%s", dump(fields[:len(want)]), dump(want))
	}
	if got := ParseInodeHeader(b); !reflect.DeepEqual(got, h) {
		t.Errorf("%+v, want %+v", got, h)
	}
	if InodeSize != 4198968 {
		t.Errorf("inode of %d bytes", InodeSize)
	}
}

func TestNames(t *testing.T) {
	long := strings.Repeat("x", 256)
	for _, c := range []struct{ payload, name, tag string }{
		{"", "", ""}, {"vm1", "vm1", ""}, {"vm1\x00junk", "vm1", ""}, {long, long, ""},
		{"vm1" + strings.Repeat("\x00", 253) + "one\x00", "vm1", "one"}, {long + long + "more", long, long},
	} {
		if name, tag := Names([]byte(c.payload)); name != c.name || tag != c.tag {
			t.Errorf("%q: %q, %q", c.payload, name, tag)
		}
	}
}

// Decoders take anything, and what is encoded again is the same.
func FuzzDecode(f *testing.F) {
	f.Add(make([]byte, InodeHeaderSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		Names(b)
		if len(b) >= HeaderSize {
			r := ParseRequest(b)
			r.Object()
			r.VDI()
		}
		if len(b) >= InodeHeaderSize {
			h := ParseInodeHeader(b)
			c := make([]byte, InodeHeaderSize)
			h.Put(c)
			if again := ParseInodeHeader(c); again.Name != h.Name || again.Size != h.Size || again.VID != h.VID || again.Tag != h.Tag {
				t.Errorf("%+v, again %+v", h, again)
			}
		}
	})
}
