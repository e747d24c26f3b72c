//go:build !linux

package main

import "os"

// dataFrom takes all for data: zeros are found when they are read.
func dataFrom(_ *os.File, off, size int64) (data, hole int64, err error) { return off, size, nil }
