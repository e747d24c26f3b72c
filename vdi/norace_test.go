//go:build !race

package vdi_test

const slow = 1
