//go:build race

package storage_test

// raceDetector says that each step takes ten times as long: see hurried.
const raceDetector = true
