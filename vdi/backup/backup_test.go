package backup

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"time"
)

func sample(t testing.TB) []byte {
	var b bytes.Buffer
	w, err := NewWriter(&b, Header{Name: "vm", Tag: "a", Identity: "x", Size: 1 << 20, ObjectSize: 1 << 20, Taken: time.Unix(1, 0).UTC()})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []func() error{
		func() error { return w.Data(0, []byte("hello")) },
		func() error { return w.Zero(5, 1000) },
		func() error { return w.Data(4096, bytes.Repeat([]byte("x"), 4096)) },
		w.Close,
	} {
		if err := f(); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

// read returns the records up to the error that ended them.
func read(b []byte) (Header, []Record, error) {
	r, err := NewReader(bytes.NewReader(b))
	if err != nil {
		return Header{}, nil, err
	}
	var list []Record
	for {
		rec, err := r.Next()
		if err != nil {
			return r.Header(), list, err
		}
		rec.Data = bytes.Clone(rec.Data)
		list = append(list, rec)
	}
}

func TestRoundTrip(t *testing.T) {
	h, list, err := read(sample(t))
	if err != io.EOF || h.Name != "vm" || h.Identity != "x" || h.Size != 1<<20 || !h.Taken.Equal(time.Unix(1, 0)) {
		t.Fatalf("%+v, %v", h, err)
	}
	if len(list) != 3 || string(list[0].Data) != "hello" || list[1].Data != nil || list[1].Off != 5 || list[1].Len != 1000 || len(list[2].Data) != 4096 {
		t.Errorf("records %+v", list)
	}
}

func TestOrder(t *testing.T) {
	w, err := NewWriter(io.Discard, Header{})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Data(10, []byte("ab")); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{w.Data(11, []byte("a")), w.Zero(0, 5), w.Zero(12, 0), w.Data(12, nil), w.Data(12, make([]byte, MaxData+1)), w.Zero(-1, 1)} {
		if err == nil {
			t.Error("accepted")
		}
	}
}

// Cut off anywhere, or with any byte changed, a backup is refused before anything that
// was not written is given out.
func TestDamage(t *testing.T) {
	good := sample(t)
	_, want, _ := read(good)
	for n := range good {
		if _, _, err := read(good[:n]); !errors.Is(err, ErrFormat) {
			t.Fatalf("cut off at %d: %v", n, err)
		}
	}
	rng := rand.New(rand.NewPCG(1, 2))
	for n := range good {
		bad := bytes.Clone(good)
		bad[n] ^= byte(1 + rng.IntN(255))
		_, got, err := read(bad)
		if !errors.Is(err, ErrFormat) {
			t.Fatalf("byte %d changed: %v", n, err)
		}
		for i := range got {
			if got[i].Off != want[i].Off || !bytes.Equal(got[i].Data, want[i].Data) {
				t.Fatalf("byte %d changed: record %d is another", n, i)
			}
		}
	}
}

func FuzzReader(f *testing.F) {
	f.Add(sample(f))
	f.Add([]byte(magic + "\x02\x00\x00\x00{}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, list, err := read(b)
		if err == nil {
			t.Fatal("no end")
		}
		if err != io.EOF && !errors.Is(err, ErrFormat) {
			t.Fatalf("%v is none of the errors of a reader of bytes", err)
		}
		at := int64(0)
		for _, r := range list {
			if r.Off < at || r.Len <= 0 || r.Off+r.Len > h.Size || r.Data != nil && int64(len(r.Data)) != r.Len {
				t.Fatalf("record %d+%d of a volume of %d", r.Off, r.Len, h.Size)
			}
			at = r.Off + r.Len
		}
	})
}
