package integration

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"testing"
	"time"

	"sheepdog/integration/driver"
	"sheepdog/integration/rig"
)

const (
	nativeInode   = 1 << 63
	nativeVMState = 1 << 62
	nativeHeader  = 4664
)

func nativeObject(vid, index uint32) uint64 { return uint64(vid)<<32 | uint64(index) }

// A client that writes nonsense gets the protocol's error, its connection lives on, and nobody's data suffers.
func TestNativeNonsense(t *testing.T) {
	s := rig.Start(t, rig.Options{})
	mine, other := rig.Random(1, 8<<20), rig.Random(2, 8<<20)
	var disks []*driver.Disk
	for name, content := range map[string][]byte{"mine": mine, "other": other} {
		if err := driver.Create(s.Native(), name, 64<<20, 0, 0); err != nil {
			t.Fatal(err)
		}
		d, err := driver.Open(s.Native(), name, "", driver.FlagDirect)
		if err == nil {
			err = d.Write(content, 0)
		}
		if err != nil {
			t.Fatal(err)
		}
		disks = append(disks, d)
	}
	if disks[0].Name != "mine" {
		disks[0], disks[1] = disks[1], disks[0]
	}
	for _, d := range disks { // the hosts of strangers have nothing open
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
	my, its := disks[0].VID(), disks[1].VID()
	c, err := driver.Dial(s.Native())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	le := binary.LittleEndian
	entries := func(vids ...uint32) (p []byte) {
		for _, v := range vids {
			p = le.AppendUint32(p, v)
		}
		return p
	}
	header := func(name string, size uint64) []byte {
		p := make([]byte, nativeHeader)
		copy(p, name)
		le.PutUint64(p[536:], size)
		return p
	}
	page := bytes.Repeat([]byte{0xff}, 4096)
	const write, create, read, discard = 3, 1, 2, 5
	for _, x := range []struct {
		what string
		r    driver.Request
		want driver.Result
	}{
		{"read of its own", driver.Request{Op: read, OID: nativeObject(my, 0), Want: 4096}, driver.OK}, // from now on "mine" is open
		{"write to what is not open", driver.Request{Op: write, Flags: driver.FlagWrite, OID: nativeObject(its, 0), Payload: page}, driver.InvalidParms},
		{"create of what is not open", driver.Request{Op: create, Flags: driver.FlagWrite, OID: nativeObject(its, 9), Payload: page}, driver.InvalidParms},
		{"read of what is not open", driver.Request{Op: read, OID: nativeObject(its, 0), Want: 4096}, driver.InvalidParms},
		{"discard of what is not open", driver.Request{Op: discard, OID: nativeObject(its, 0)}, driver.InvalidParms},
		{"copy of what has nothing to do with it", driver.Request{Op: create, Flags: driver.FlagWrite | driver.FlagCow, OID: nativeObject(my, 9), Cow: nativeObject(its, 9), Payload: page}, driver.InvalidParms},
		{"copy of another place", driver.Request{Op: create, Flags: driver.FlagWrite | driver.FlagCow, OID: nativeObject(my, 9), Cow: nativeObject(my, 1), Payload: page}, driver.InvalidParms},
		{"foreign vid in the map", driver.Request{Op: write, Flags: driver.FlagWrite, OID: nativeInode | nativeObject(my, 0), Offset: nativeHeader, Payload: entries(its, my)}, driver.InvalidParms},
		{"vid that nobody has", driver.Request{Op: write, Flags: driver.FlagWrite, OID: nativeInode | nativeObject(my, 0), Offset: nativeHeader, Payload: entries(0x123456)}, driver.InvalidParms},
		{"part of an entry", driver.Request{Op: write, Flags: driver.FlagWrite, OID: nativeInode | nativeObject(my, 0), Offset: nativeHeader + 2, Payload: page[:4]}, driver.InvalidParms},
		{"entry beyond the map", driver.Request{Op: write, Flags: driver.FlagWrite, OID: nativeInode | nativeObject(my, 0), Offset: nativeHeader + 4<<20, Payload: page[:4]}, driver.InvalidParms},
		{"map of zeros", driver.Request{Op: write, Flags: driver.FlagWrite, OID: nativeInode | nativeObject(my, 0), Offset: nativeHeader, Payload: make([]byte, 64)}, driver.OK}, // ignored
		{"map of what is not open", driver.Request{Op: write, Flags: driver.FlagWrite, OID: nativeInode | nativeObject(its, 0), Offset: nativeHeader, Payload: make([]byte, 4)}, driver.InvalidParms},
		{"header with another name", driver.Request{Op: write, Flags: driver.FlagWrite, OID: nativeInode | nativeObject(my, 0), Payload: header("other", 64<<20)}, driver.InvalidParms},
		{"size beyond the map", driver.Request{Op: write, Flags: driver.FlagWrite, OID: nativeInode | nativeObject(my, 0), Payload: header("mine", 1<<50)}, driver.InvalidParms},
		{"smaller size", driver.Request{Op: write, Flags: driver.FlagWrite, OID: nativeInode | nativeObject(my, 0), Payload: header("mine", 1<<20)}, driver.OK}, // ignored
		{"write beyond the object", driver.Request{Op: write, Flags: driver.FlagWrite, OID: nativeObject(my, 0), Offset: 4<<20 - 1, Payload: page}, driver.InvalidParms},
		{"write far beyond the object", driver.Request{Op: write, Flags: driver.FlagWrite, OID: nativeObject(my, 0), Offset: 1<<64 - 4096, Payload: page}, driver.InvalidParms},
		{"write beyond the volume", driver.Request{Op: create, Flags: driver.FlagWrite, OID: nativeObject(my, 16), Payload: page}, driver.InvalidParms},
		{"write far beyond the volume", driver.Request{Op: create, Flags: driver.FlagWrite, OID: nativeObject(my, 1<<32-1), Payload: page}, driver.InvalidParms},
		{"read beyond the object", driver.Request{Op: read, OID: nativeObject(my, 0), Offset: 4<<20 - 1, Want: 4096}, driver.InvalidParms},
		{"read of 4 GiB", driver.Request{Op: read, OID: nativeObject(my, 0), Want: 1<<32 - 1}, driver.InvalidParms},
		{"state beyond every object", driver.Request{Op: write, Flags: driver.FlagWrite, OID: nativeVMState | nativeObject(my, 1<<31), Payload: page}, driver.InvalidParms},
		{"state that is not there", driver.Request{Op: read, OID: nativeVMState | nativeObject(my, 0), Want: 4096}, driver.NoObject},
		{"object of no kind", driver.Request{Op: write, Flags: driver.FlagWrite, OID: 1<<57 | nativeObject(my, 0), Payload: page}, driver.InvalidParms},
		{"part of a stored map", driver.Request{Op: write, Flags: driver.FlagWrite, OID: 1<<58 | nativeObject(my, 0), Payload: page}, driver.InvalidParms},
		{"stored map read", driver.Request{Op: read, OID: 1<<58 | nativeObject(my, 0), Want: 4096}, driver.NoObject},
		{"vid that nobody has read", driver.Request{Op: read, OID: nativeObject(0x123456, 0), Want: 4096}, driver.NoObject},
		{"vid that nobody has written", driver.Request{Op: write, Flags: driver.FlagWrite, OID: nativeObject(0x123456, 0), Payload: page}, driver.NoVDI},
		{"unknown operation", driver.Request{Op: 0x77}, driver.InvalidParms},
		{"unknown operation with a payload", driver.Request{Op: 0xff, Flags: driver.FlagWrite, Payload: page}, driver.InvalidParms},
		{"write without a payload", driver.Request{Op: write, OID: nativeObject(my, 0), Want: 4096}, driver.InvalidParms},
		{"name that cannot be", driver.Request{Op: 0x11, Flags: driver.FlagWrite, VDISize: 1 << 20, Payload: []byte("a/b\x00")}, driver.InvalidParms},
		{"VDI that there is", driver.Request{Op: 0x11, Flags: driver.FlagWrite, VDISize: 1 << 20, Payload: []byte("mine\x00")}, driver.Exists},
		{"clone of what is no snapshot", driver.Request{Op: 0x11, Flags: driver.FlagWrite, Base: my, Payload: []byte("new\x00")}, driver.InvalidParms},
		{"clone of nothing", driver.Request{Op: 0x11, Flags: driver.FlagWrite, Base: 0x123456, Payload: []byte("new\x00")}, 0x09},
		{"look-up of nothing", driver.Request{Op: 0x14, Flags: driver.FlagWrite, Payload: []byte("none\x00")}, driver.NoVDI},
		{"look-up of no snapshot", driver.Request{Op: 0x14, Flags: driver.FlagWrite, SnapID: 7, Payload: []byte("mine\x00")}, driver.NoTag},
		{"deletion of what is in use", driver.Request{Op: 0x17, Flags: driver.FlagWrite, Payload: []byte("mine\x00")}, 0x07},
		{"release of what is not open", driver.Request{Op: 0x13, Base: its}, driver.NotLocked},
	} {
		r, err := c.Call(x.r)
		if err != nil {
			t.Fatalf("%s: the connection is lost: %v", x.what, err)
		}
		if err := r.Err(); err == nil && x.want != driver.OK || err != nil && !errors.Is(err, x.want) {
			t.Errorf("%s: %v, want %v", x.what, err, x.want)
		}
	}
	mustRead(t, s, "mine", 0, mine)
	mustRead(t, s, "other", 0, other)
}

// Whatever bytes a stranger sends, memory stays bounded, and who works beside him is not disturbed.
func TestNativeHostile(t *testing.T) {
	s := rig.Start(t, rig.Options{})
	if err := driver.Create(s.Native(), "vm", 64<<20, 0, 0); err != nil {
		t.Fatal(err)
	}
	d, err := driver.Open(s.Native(), "vm", "", driver.FlagCache)
	if err != nil {
		t.Fatal(err)
	}
	p := rig.Random(3, 8<<10) // so little that it needs none of the memory that strangers may take
	check := func(what string) {
		t.Helper()
		if err := d.Write(p, 3<<20); err != nil {
			t.Fatalf("after %s: %v", what, err)
		}
		got := make([]byte, len(p))
		if err := d.Read(got, 3<<20); err != nil || !bytes.Equal(got, p) {
			t.Fatalf("after %s: %v", what, err)
		}
	}
	check("nothing")
	before := s.RSS()
	dial := func() net.Conn {
		conn, err := net.Dial("tcp", s.Native())
		if err != nil {
			t.Fatal(err)
		}
		conn.SetDeadline(time.Now().Add(20 * time.Second * patience()))
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	rng := rand.New(rand.NewPCG(1, 2))
	for range 50 {
		conn := dial()
		b := make([]byte, rng.IntN(4096))
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		if rng.IntN(2) == 0 && len(b) > 4 {
			b[0], b[1] = 0, byte(rng.IntN(0x19)) // an operation, with anything for it
		}
		conn.Write(b)
		conn.Close()
	}
	check("random bytes")
	for range 20 { // payloads that never come
		r := driver.Request{Op: 3, Flags: driver.FlagWrite, OID: nativeObject(d.VID(), 1), Payload: make([]byte, 32<<20)}
		dial().Write(r.Bytes(1)[:100])
	}
	check("payloads that never come")
	for range 20 { // answers that nobody reads
		conn := dial()
		r := driver.Request{Op: 2, OID: nativeInode | nativeObject(d.VID(), 0), Want: nativeHeader + 4<<20}
		go conn.Write(bytes.Repeat(r.Bytes(1), 1000))
	}
	time.Sleep(500 * time.Millisecond)
	check("answers that nobody reads")
	const bound = 384<<20 + 128<<20 // the budget, and what else a sheep has
	if grown := s.RSS() - before; grown > bound {
		t.Errorf("%d MiB more resident memory, want at most %d", grown>>20, bound>>20)
	}
	conn := dial()
	r := driver.Request{Proto: 9, Op: 2, OID: nativeInode}
	conn.Write(r.Bytes(5))
	h := make([]byte, 48)
	if _, err := io.ReadFull(conn, h); err != nil || binary.LittleEndian.Uint32(h[16:]) != 0x14 {
		t.Errorf("a strange version is answered with %x, %v", h, err)
	}
}
