//go:build !race

package sim

const raceDetector = false

// some is how many of n seeds are told: all.
func some(n uint64) uint64 { return n }
