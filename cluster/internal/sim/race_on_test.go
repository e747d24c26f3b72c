//go:build race

package sim

const raceDetector = true

// some is how many of n seeds are told: one event happens at a time in a story, so that the detector finds in each what it
// finds in others. "make sim" tells all, without it.
func some(n uint64) uint64 { return max(1, n/4) }
