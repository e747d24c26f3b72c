//go:build race

package storage_test

// raceDetector makes the long tests do less: under the detector each step takes ten
// times as long.
const raceDetector = true
