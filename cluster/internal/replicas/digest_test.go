package replicas

import (
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"sheepdog/storage/object"
)

// What is told of a table makes any other one equal to it.
func TestDifference(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 1))
	for round := range 500 {
		theirs := make([]uint64, 256<<rnd.IntN(3))
		for i := range theirs {
			if rnd.IntN(3) > 0 {
				theirs[i] = rnd.Uint64()
			}
		}
		var own []uint64
		changed := rnd.IntN(4)
		switch round % 4 {
		case 0: // nothing here
		case 1: // of another size: it counts as nothing
			own = make([]uint64, 128)
			own[3] = 7
		default:
			own = slices.Clone(theirs)
			for range changed {
				own[rnd.IntN(len(own))] = rnd.Uint64N(2)
			}
		}
		b := appendDifference(nil, theirs, digests(own))
		got := make([]uint64, len(theirs))
		if len(own) == len(got) {
			copy(got, own)
		}
		if err := decodeDifference(b, got); err != nil || !slices.Equal(got, theirs) {
			t.Fatalf("round %d: tables are not equal: %v", round, err)
		}
		if round%4 > 1 && len(b) > changed*(4+stretch*8) {
			t.Fatalf("round %d: %d bytes for %d blocks", round, len(b), changed)
		}
	}
}

func FuzzDifference(f *testing.F) {
	f.Add(appendDifference(nil, make([]uint64, 256), make([]uint64, 4)))
	f.Fuzz(func(t *testing.T, b []byte) {
		_ = decodeDifference(b, make([]uint64, 256))
	})
}

// TestContentIsKnownByAllOfItsBits: data that arrives is what was sent, or refused; and the checksums that are stored with
// it are those of its blocks.
func TestContentIsKnownByAllOfItsBits(t *testing.T) {
	rnd := rand.New(rand.NewPCG(2, 2))
	for _, c := range []struct{ off, len uint32 }{{0, 4096}, {8192, 4096}, {0, 64 * 4096}, {4096, 65 * 4096}, {0, 4 << 20}, {512, 4096}, {0, 4095}, {4095, 1}} {
		data := make([]byte, c.len)
		for i := range data {
			data[i] = byte(rnd.Uint32())
		}
		var sent, got content
		sent.of(c.off, data)
		m := action{verb: VerbWrite, off: c.off, len: c.len, sum: sent.sum}
		if err := got.arrived(&m, data); err != nil {
			t.Fatalf("%+v: %v", c, err)
		}
		var want []uint64
		if c.off%object.BlockSize == 0 && c.len%object.BlockSize == 0 {
			want = object.AppendSums(nil, data)
		}
		if !slices.Equal(got.sums, want) {
			t.Errorf("%+v: checksums are not those of the blocks", c)
		}
		for range 20 {
			i := rnd.IntN(len(data))
			data[i] ^= 1 << rnd.IntN(8)
			if err := got.arrived(&m, data); !errors.Is(err, errDamaged) {
				t.Fatalf("%+v: byte %d is another one: %v", c, i, err)
			}
			sent.made = false
			sent.of(c.off, data)
			m.sum = sent.sum
		}
		if err := got.arrived(&m, data[1:]); !errors.Is(err, errDamaged) {
			t.Errorf("%+v: a byte less: %v", c, err)
		}
		if len(data) >= 2*object.BlockSize { // blocks that changed places
			x := slices.Clone(data[:object.BlockSize])
			copy(data, data[object.BlockSize:2*object.BlockSize])
			copy(data[object.BlockSize:], x)
			if err := got.arrived(&m, data); !errors.Is(err, errDamaged) {
				t.Errorf("%+v: blocks in another order: %v", c, err)
			}
		}
	}
}
