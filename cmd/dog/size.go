package main

import (
	"fmt"
	"math"
	"math/big"
	"math/bits"
	"strconv"
	"strings"
	"time"
)

// units of sizes, powers of 1024.
const units = "KMGTPE"

// parseSize reads a size: a number, possibly with a fraction, and a unit (K, M, G, T, P, E;
// also as KB or KiB). The result must be a whole number of bytes.
func parseSize(s string) (int64, error) {
	number := strings.TrimRight(s, "KMGTPEkmgtpeiB")
	shift := 0
	if unit := s[len(number):]; unit != "" && unit != "B" {
		i := strings.IndexByte(units, strings.ToUpper(unit)[0])
		if rest := unit[1:]; i < 0 || rest != "" && rest != "B" && rest != "iB" {
			return 0, badSize(s)
		}
		shift = 10 * (i + 1)
	}
	if number == "" || strings.Trim(number, "0123456789.") != "" || len(number) > 64 {
		return 0, badSize(s)
	}
	n, ok := new(big.Rat).SetString(number)
	if !ok {
		return 0, badSize(s)
	}
	n.Mul(n, new(big.Rat).SetInt(new(big.Int).Lsh(big.NewInt(1), uint(shift))))
	switch {
	case !n.IsInt():
		return 0, usagef("%q is not a whole number of bytes", s)
	case !n.Num().IsInt64():
		return 0, usagef("%q is more than %d bytes", s, int64(math.MaxInt64))
	}
	return n.Num().Int64(), nil
}

func badSize(s string) error {
	return usagef("%q is not a size: give a number of bytes, or one with K, M, G, T or P, as in 10G", s)
}

// sizeFlag is a flag that takes a size.
type sizeFlag struct{ n int64 }

// String implements pflag.Value.
func (f *sizeFlag) String() string {
	if f.n == 0 {
		return ""
	}
	return strconv.FormatInt(f.n, 10)
}

// Set implements pflag.Value.
func (f *sizeFlag) Set(s string) (err error) {
	f.n, err = parseSize(s)
	return err
}

// Type implements pflag.Value.
func (f *sizeFlag) Type() string { return "SIZE" }

// human gives a number of bytes as people read it: three digits and a unit.
func human(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	i := (bits.Len64(uint64(n)) - 1) / 10
	v := float64(n) / float64(uint64(1)<<(10*i))
	if v >= 999.5 && i < len(units) {
		v, i = v/1024, i+1
	}
	text := strconv.FormatFloat(v, 'f', max(0, 2-len(strconv.Itoa(int(v)))+1), 64)
	if strings.Contains(text, ".") {
		text = strings.TrimRight(strings.TrimRight(text, "0"), ".")
	}
	return text + " " + units[i-1:i] + "iB"
}

// when gives a time as people read it.
func (a *app) when(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.In(a.zone).Format("2006-01-02 15:04:05")
}
