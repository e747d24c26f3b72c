// Package listentest is for tests of servers: it hears what they log of sessions that end.
package listentest

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"
)

// Ends collects the ends of sessions, each as "LEVEL reason". It is the handler of a server's logger.
type Ends struct {
	mu   sync.Mutex
	list []string
}

// Logger is for the server.
func (e *Ends) Logger() *slog.Logger { return slog.New(e) }

// Enabled implements slog.Handler.
func (e *Ends) Enabled(context.Context, slog.Level) bool { return true }

// Handle implements slog.Handler.
func (e *Ends) Handle(_ context.Context, r slog.Record) error {
	if r.Message != "session ended" {
		return nil
	}
	reason := "no reason"
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == "reason" {
			reason = a.Value.String()
		}
		return true
	})
	e.mu.Lock()
	defer e.mu.Unlock()
	e.list = append(e.list, r.Level.String()+" "+reason)
	return nil
}

// WithAttrs implements slog.Handler.
func (e *Ends) WithAttrs([]slog.Attr) slog.Handler { return e }

// WithGroup implements slog.Handler.
func (e *Ends) WithGroup(string) slog.Handler { return e }

// All is what has ended so far, sorted.
func (e *Ends) All() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Sorted(slices.Values(e.list))
}

// Await waits until n sessions have ended, and returns All.
func (e *Ends) Await(t testing.TB, n int) []string {
	t.Helper()
	for until := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		if list := e.All(); len(list) >= n {
			return list
		} else if time.Now().After(until) {
			t.Fatalf("%d sessions have not ended: %q", n, list)
		}
	}
}
