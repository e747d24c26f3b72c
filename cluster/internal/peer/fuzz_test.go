package peer

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"testing"
	"time"

	"github.com/zeebo/xxh3"
)

func FuzzHeader(f *testing.F) {
	var b [headerSize]byte
	h := header{typ: frameRequest, op: 1, id: 1 << slotBits, data: 4096, head: 40, want: 10}
	h.encode(&b, 7)
	f.Add(b[:], uint64(7))
	f.Fuzz(func(t *testing.T, p []byte, seed uint64) {
		if len(p) < headerSize {
			return
		}
		h, err := decodeHeader(p[:headerSize], seed)
		if err != nil {
			return
		}
		if h.head > MaxHead || h.data > MaxData || h.want > MaxData || h.size() > headerSize+MaxHead+MaxData {
			t.Errorf("%+v", h)
		}
		var again [headerSize]byte
		if h.encode(&again, seed); !bytes.Equal(again[:], p[:headerSize]) {
			t.Errorf("%x is encoded as %x", p[:headerSize], again)
		}
	})
}

func FuzzHello(f *testing.F) {
	h := hello{version: helloVersion, kind: KindData, from: Identity{Cluster: testCluster, Name: "n"}, to: "m", text: "t"}
	f.Add(h.encode())
	h.version = 3
	f.Add(h.encode())
	f.Fuzz(func(t *testing.T, p []byte) {
		if h, err := readHello(bytes.NewReader(p)); err == nil && h.version == helloVersion {
			if again, err := decodeHello(h.encode()); err != nil || again != h {
				t.Errorf("%+v becomes %+v, %v", h, again, err)
			}
		}
		// The same with a checksum that fits, as a hostile node would send it.
		if len(p) < helloPrefix+helloSum || len(p) > maxHello {
			return
		}
		if h, err := decodeHello(sealed(p)); err == nil && h.version == helloVersion {
			judge(&h, Identity{Cluster: testCluster, Name: "m"}, "n", func(*hello) *RefusedError { return nil })
		}
	})
}

// FuzzSession feeds a session what a hostile node may send after the hello.
func FuzzSession(f *testing.F) {
	frame := func(h header, n int) []byte {
		var b [headerSize]byte
		h.encode(&b, 7)
		return append(b[:], make([]byte, n)...)
	}
	f.Add(frame(header{typ: frameRequest, op: opEcho, id: 1 << slotBits, head: 10, data: 100, want: 100}, 110))
	f.Add(frame(header{typ: frameRequest, op: opEcho, id: 1 << slotBits, data: inPlaceMax + 1}, inPlaceMax))
	f.Add(frame(header{typ: framePing, id: 5}, 0))
	handler := new(echoes)
	t, err := New(Config{Identity: Identity{Name: "m"}, Insecure: true, Handler: handler, Linger: time.Millisecond, Errors: map[uint16]error{256: errOwn}})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(tt *testing.T, p []byte) {
		p = bytes.Clone(p)
		for at := 0; at+headerSize <= len(p); { // most pass the first look
			h, err := decodeHeader(sealedHeader(p[at:], 7)[:headerSize], 7)
			if err != nil {
				break
			}
			at += h.size()
		}
		a, b := net.Pipe()
		c := newConn(stream{Conn: b, raw: b}, Data, Identity{Name: "n"}, 7, t.budgets[Data])
		s := newSession(c, t)
		over := make(chan struct{})
		go func() { s.run(); close(over) }()
		go io.Copy(io.Discard, a)
		a.SetDeadline(time.Now().Add(5 * time.Second))
		a.Write(p)
		a.Close()
		for end := time.Now().Add(10 * time.Second); ; handler.let() {
			select {
			case <-over:
			case <-time.After(time.Millisecond):
				if time.Now().Before(end) {
					continue
				}
				tt.Fatal("session stays")
			}
			break
		}
		if n := t.budgets[Data].inUse(); n != 0 || s.inflight.Load() != 0 {
			tt.Errorf("%d bytes and %d requests are left", n, s.inflight.Load())
		}
	})
}

// sealed gives a hello a checksum that fits.
func sealed(p []byte) []byte {
	p = bytes.Clone(p)
	binary.LittleEndian.PutUint64(p[len(p)-helloSum:], xxh3.Hash(p[:len(p)-helloSum]))
	return p
}

// sealedHeader gives a header a magic number and a checksum that fit.
func sealedHeader(p []byte, seed uint64) []byte {
	binary.LittleEndian.PutUint32(p, frameMagic)
	binary.LittleEndian.PutUint32(p[28:], uint32(xxh3.HashSeed(p[:28], seed)))
	return p
}
