package conf

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

const sizeUnits = "KMGTPE"

// ParseSize reads a number of bytes: 4096, 64K, 10G, 1.5T; the units are powers of 1024
// and may be written as K, KB or KiB, in either case.
func ParseSize(s string) (int64, error) {
	bad := fmt.Errorf("%q is not a size: write a number of bytes, or one with K, M, G, T or P, as in 10G", s)
	number := strings.ToUpper(strings.TrimSpace(s))
	if short, ok := strings.CutSuffix(number, "B"); ok {
		number = short
		if short, ok := strings.CutSuffix(number, "I"); ok {
			number = short
			if number == "" || !strings.Contains(sizeUnits, number[len(number)-1:]) {
				return 0, bad
			}
		}
	}
	factor := 1.0
	if number != "" {
		if i := strings.IndexByte(sizeUnits, number[len(number)-1]); i >= 0 {
			number = number[:len(number)-1]
			factor = float64(uint64(1) << (10 * (i + 1)))
		}
	}
	if number == "" || strings.Trim(number, "0123456789.") != "" {
		return 0, bad
	}
	if n, err := strconv.ParseInt(number, 10, 64); err == nil {
		if n > math.MaxInt64/int64(factor) {
			return 0, fmt.Errorf("%q is more than there are bytes", s)
		}
		return n * int64(factor), nil
	}
	f, err := strconv.ParseFloat(number, 64)
	switch f *= factor; {
	case err != nil:
		return 0, bad
	case f >= math.MaxInt64:
		return 0, fmt.Errorf("%q is more than there are bytes", s)
	case f != math.Trunc(f):
		return 0, fmt.Errorf("%q is not a whole number of bytes", s)
	}
	return int64(f), nil
}
