package catalog

import (
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// CheckName refuses names of VDIs that are not 1 to MaxName bytes of printable UTF-8, or
// that have '/' or '@': "NAME@TAG" and paths of the API shall have one meaning.
func CheckName(name string) error { return checkText("name", name) }

func checkText(what, s string) error {
	switch {
	case s == "":
		return refuse(ErrInvalid, "the %s is empty", what)
	case len(s) > MaxName:
		return refuse(ErrInvalid, "the %s is %d bytes long, at most %d are allowed", what, len(s), MaxName)
	case strings.ContainsRune(s, utf8.RuneError): // U+FFFD is what JSON makes of other bytes on their way
		return refuse(ErrInvalid, "the %s %q is not UTF-8", what, s)
	case strings.ContainsAny(s, "/@"):
		return refuse(ErrInvalid, "the %s %q contains '/' or '@', which is not allowed", what, s)
	case s == "." || s == "..":
		return refuse(ErrInvalid, "the %s %q is not allowed", what, s)
	case strings.HasPrefix(s, " ") || strings.HasSuffix(s, " "):
		return refuse(ErrInvalid, "the %s %q begins or ends with a space", what, s)
	}
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return refuse(ErrInvalid, "the %s %q contains the unprintable character %U", what, s, r)
		}
	}
	return nil
}

// CheckTag refuses tags that no name could be, and numbers other than id, which is the
// snapshot's own: a number names the snapshot of that id. "" is allowed.
func CheckTag(tag string, id uint32) error {
	if tag == "" {
		return nil
	}
	if err := checkText("tag", tag); err != nil {
		return err
	}
	if isNumber(tag) && tag != strconv.FormatUint(uint64(id), 10) {
		return refuse(ErrInvalid, "the tag %q is a number, which stands for the snapshot of that id: use a tag with another character in it", tag)
	}
	return nil
}

func isNumber(s string) bool {
	return strings.Trim(s, "0123456789") == ""
}

// snapshotID reads a tag as a snapshot's id; 0 if it is none.
func snapshotID(tag string) uint32 {
	if !isNumber(tag) {
		return 0
	}
	n, err := strconv.ParseUint(tag, 10, 32)
	if err != nil {
		return 0
	}
	return uint32(n)
}
