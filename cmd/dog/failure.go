package main

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"unicode"

	"github.com/spf13/cobra"

	"sheepdog/frontends/admin/api"
)

// usageError is a call that makes no sense.
type usageError struct{ text string }

func (u *usageError) Error() string { return u.text }

func usagef(format string, args ...any) error { return &usageError{fmt.Sprintf(format, args...)} }

// hinted is an error with a word on what to do next.
type hinted struct {
	err  error
	hint string
}

func (h *hinted) Error() string { return h.err.Error() }
func (h *hinted) Unwrap() error { return h.err }

func hint(hint, format string, args ...any) error {
	return &hinted{fmt.Errorf(format, args...), hint}
}

// report tells people of an error, and returns the exit status.
func (a *app) report(cmd *cobra.Command, err error) int {
	if err == nil {
		return exitDone
	}
	if errors.Is(err, syscall.EPIPE) {
		return exitFailed // who read the output has gone, and knows
	}
	text, next := err.Error(), ""
	if e, ok := errors.AsType[*api.Error](err); ok {
		next = e.Hint
	}
	if h, ok := errors.AsType[*hinted](err); ok {
		next = h.hint
	}
	if _, ok := errors.AsType[*usageError](err); ok {
		path := a.program()
		if cmd != nil {
			path = cmd.CommandPath()
		}
		fmt.Fprintf(a.err, "%s: %s\nSee \"%s --help\".\n", a.program(), printable(text), path)
		return exitUsage
	}
	fmt.Fprintf(a.err, "%s: %s\n", a.program(), printable(text))
	if next != "" {
		fmt.Fprintf(a.err, "  %s\n", printable(a.ownName(next)))
	}
	return exitFailed
}

// ownName makes advice name the program as it was called.
func (a *app) ownName(s string) string {
	return strings.ReplaceAll(s, `"dog `, `"`+a.program()+` `)
}

// printable takes from text what could do things to a terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || unicode.IsPrint(r) {
			return r
		}
		return '�'
	}, s)
}
