package main

import (
	"errors"
	"os"
	"syscall"
)

// SEEK_DATA and SEEK_HOLE of lseek(2).
const (
	seekData = 3
	seekHole = 4
)

// dataFrom finds the next data at or after off, and where it ends. Without any both are
// size. Where holes cannot be found, all is data.
func dataFrom(f *os.File, off, size int64) (data, hole int64, err error) {
	data, err = f.Seek(off, seekData)
	switch {
	case errors.Is(err, syscall.ENXIO):
		return size, size, nil
	case errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.EOPNOTSUPP):
		return off, size, nil
	case err != nil:
		return 0, 0, err
	}
	if hole, err = f.Seek(data, seekHole); err != nil {
		return 0, 0, err
	}
	return min(data, size), min(hole, size), nil
}
