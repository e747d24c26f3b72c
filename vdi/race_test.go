//go:build race

package vdi_test

// slow is by how much tests that try everything try less under the race detector.
const slow = 4
