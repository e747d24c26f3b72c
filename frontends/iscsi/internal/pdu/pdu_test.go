package pdu

import "testing"

// The examples of RFC 3720 appendix B.4.
func TestDigest(t *testing.T) {
	ones, rising := make([]byte, 32), make([]byte, 32)
	for i := range ones {
		ones[i], rising[i] = 0xff, byte(i)
	}
	for _, row := range []struct {
		data []byte
		want [4]byte
	}{{make([]byte, 32), [4]byte{0xaa, 0x36, 0x91, 0x8a}}, {ones, [4]byte{0x43, 0xab, 0xa8, 0x62}}, {rising, [4]byte{0x4e, 0x79, 0xdd, 0x46}}} {
		if got := Digest(row.data[:10], row.data[10:]); got != row.want {
			t.Errorf("%x: %x, want %x", row.data, got, row.want)
		}
	}
}

func FuzzText(f *testing.F) {
	f.Add([]byte("a=b\x00c=\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := ParseText(b)
		if err != nil {
			return
		}
		var again []byte
		for _, p := range list {
			again = AppendText(again, p.Key, p.Value)
		}
		if more, err := ParseText(again); err != nil || len(more) != len(list) {
			t.Fatalf("%q becomes %q: %v", b, again, err)
		}
	})
}

func TestBefore(t *testing.T) {
	for _, row := range []struct {
		a, b uint32
		want bool
	}{{1, 2, true}, {2, 1, false}, {1, 1, false}, {0xffffffff, 0, true}, {0, 0xffffffff, false}} {
		if got := Before(row.a, row.b); got != row.want {
			t.Errorf("%#x before %#x: %v", row.a, row.b, got)
		}
	}
}
