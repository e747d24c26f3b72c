package replicas

import (
	"math/rand/v2"
	"slices"
	"testing"
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
