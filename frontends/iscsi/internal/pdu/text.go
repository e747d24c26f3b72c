package pdu

import (
	"bytes"
	"errors"
	"fmt"
)

// Pair is one key=value of a text.
type Pair struct{ Key, Value string }

// Bounds of text (RFC 7143 section 6.1): a key is at most 63 bytes; values of ours never
// need more than maxValue, nor any text more than maxPairs pairs.
const (
	maxKey   = 63
	maxValue = 8192
	maxPairs = 256
)

// ErrText says that a text is not made of key=value pairs.
var ErrText = errors.New("malformed text")

// ParseText splits the text of a login or text request.
func ParseText(b []byte) ([]Pair, error) {
	var list []Pair
	for len(b) > 0 {
		item, rest, ended := bytes.Cut(b, []byte{0})
		if !ended {
			return nil, fmt.Errorf("%w: the last pair has no end", ErrText)
		}
		b = rest
		if len(item) == 0 {
			continue // some initiators pad with them
		}
		key, value, ok := bytes.Cut(item, []byte{'='})
		switch {
		case !ok || len(key) == 0 || len(key) > maxKey:
			return nil, fmt.Errorf("%w: %.80q is no key=value", ErrText, item)
		case len(value) > maxValue:
			return nil, fmt.Errorf("%w: the value of %s has %d bytes", ErrText, key, len(value))
		case len(list) == maxPairs:
			return nil, fmt.Errorf("%w: more than %d pairs", ErrText, maxPairs)
		}
		list = append(list, Pair{string(key), string(value)})
	}
	return list, nil
}

// AppendText appends a pair to a text.
func AppendText(b []byte, key, value string) []byte {
	b = append(b, key...)
	b = append(b, '=')
	b = append(b, value...)
	return append(b, 0)
}
